"""Counters of one device, in one page of words: operations, denials by reason, latencies.

The page may be shared memory, so that whoever reads it costs the worker nothing. Latencies are counted in buckets of
powers of two nanoseconds: `percentile` answers with a bucket's upper end, at most a factor of two above the truth.
"""

from __future__ import annotations

from array import array
from typing import Any, Final

from devices.gate import Denial, Op

#: Buckets of an operation's latency: below 2^n ns each, 2^35 ns (34 s) and above in the last.
LATENCY_BUCKETS: Final = 36
#: Words of an operation: allowed, denied, bytes, latency buckets.
OP_WORDS: Final = 3 + LATENCY_BUCKETS
OP_COUNT: Final = len(Op)
DENIAL_BASE: Final = OP_COUNT * OP_WORDS
PAGE_WORDS: Final = DENIAL_BASE + len(Denial)
PAGE_BYTES: Final = 8 * PAGE_WORDS

# The same for the compiled code: C integers, which other modules cannot import.
_BUCKETS: Final = LATENCY_BUCKETS
_WORDS: Final = OP_WORDS


class Stats:
    """Counts the operations of `ops`; `page` is PAGE_BYTES of zeroed or earlier counted memory."""

    def __init__(self, *ops: Op, page: memoryview | None = None) -> None:
        self.ops = ops
        self.words = (
            memoryview(array("Q", bytes(PAGE_BYTES))) if page is None else page[:PAGE_BYTES].cast("Q")
        )

    def allow(self, op: Op, size_bytes: int = 0) -> None:
        """Count an operation that was done."""
        self.count(op.index, size_bytes)

    def deny(self, op: Op, reason: Denial) -> None:
        """Count an operation that was refused."""
        self.words[op.index * OP_WORDS + 1] += 1
        self.words[DENIAL_BASE + reason.index] += 1

    def count(self, index: int, size_bytes: int) -> None:
        """`allow` by the operation's index."""
        base = index * _WORDS
        self.words[base] += 1
        self.words[base + 2] += size_bytes

    def sample(self, index: int, nanoseconds: int) -> None:
        """Count one latency of the operation with this index."""
        bucket = 0
        while nanoseconds and bucket < _BUCKETS - 1:
            nanoseconds >>= 1
            bucket += 1
        self.words[index * _WORDS + 3 + bucket] += 1

    def percentile(self, op: Op, fraction: float) -> int:
        """Nanoseconds that `fraction` of the sampled operations stayed below; 0 when none was sampled."""
        base = op.index * OP_WORDS + 3
        buckets = list(self.words[base : base + LATENCY_BUCKETS])
        wanted = fraction * sum(buckets)
        seen = 0
        for bucket, count in enumerate(buckets):
            seen += count
            if count and seen >= wanted:
                return 1 << bucket
        return 0

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready: operation -> allowed, denied, bytes, latency percentiles; denials by reason."""
        operations = {}
        for op in self.ops:
            base = op.index * OP_WORDS
            allowed, denied, size = list(self.words[base : base + 3])
            latency = {
                name: self.percentile(op, at) for name, at in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
            }
            operations[op.value] = {
                "allowed": allowed,
                "denied": denied,
                "bytes": size,
                "latency_ns": latency,
            }
        denials = list(self.words[DENIAL_BASE:PAGE_WORDS])
        return {
            "operations": operations,
            "denials": {reason.value: denials[reason.index] for reason in Denial if denials[reason.index]},
        }

"""Counts what a device does into its account (`account.py`), which others read while it runs.

Everything is counted. Every denial is kept with its time. What GPU, input and consoles do is all timed and kept. What
disks and network cards do is timed, kept and profiled in *samples*: their rings take the first request of each wake-up
and every sixteenth behind it (a network card every 64th), so that an idle device has all and a busy one pays little;
with a `sample_mask` of 0 they take each.
"""

from __future__ import annotations

from typing import Any, Final

from rayos_devices.account import (
    ACCOUNT_BYTES,
    COUNTER_BASE,
    DENIAL_BASE,
    DEPTH,
    DONE,
    LATENCY_BUCKETS,
    LAYOUT,
    LIMIT_BASE,
    NAME_BASE,
    NAME_BYTES,
    NEXT,
    OP_WORDS,
    OPERATIONS,
    OPS,
    PROFILE_BASE,
    PROFILE_WORDS,
    PROFILED,
    SLOT_BASE,
    SLOT_WORDS,
    Account,
    private_account,
)
from rayos_devices.gate import Denial, Op
from rayos_devices.native import fence, now_ns

SAMPLED: Final = 16

# The same for the compiled code: C integers, which other modules cannot import.
_BUCKETS: Final = LATENCY_BUCKETS
_WORDS: Final = OP_WORDS
_COUNTERS: Final = COUNTER_BASE
_DENIALS: Final = DENIAL_BASE
_NEXT: Final = NEXT
_SLOTS: Final = SLOT_BASE
_SLOT: Final = SLOT_WORDS
_KEPT_MASK: Final = OPERATIONS - 1
_PROFILES: Final = PROFILE_BASE
_PROFILE: Final = PROFILE_WORDS
_PROFILED_MASK: Final = PROFILED - 1
_DONE: Final = DONE << 8
_U32: Final = 0xFFFF_FFFF


class Stats:
    """Counts the operations of `ops`; `page` is ACCOUNT_BYTES of zeroed or earlier counted memory."""

    def __init__(self, *ops: Op, page: memoryview | None = None) -> None:
        self.ops = ops
        self.words = private_account() if page is None else page[:ACCOUNT_BYTES].cast("Q")
        #: A power of two less one: of so many operations in a row all but one are not timed.
        self.sample_mask = SAMPLED - 1
        self._adopt("")

    def move(self, page: memoryview, name: str) -> None:
        """Go on in an account that others see, ACCOUNT_BYTES, from what was counted there before."""
        self.words = page[:ACCOUNT_BYTES].cast("Q")
        self._adopt(name)

    def _adopt(self, name: str) -> None:
        if self.words[0] not in (0, LAYOUT):
            for index in range(len(self.words)):
                self.words[index] = 0
        self.words[0] = LAYOUT
        self.words[OPS] = sum(1 << op.index for op in self.ops)
        data = name.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
        for index in range(NAME_BYTES // 8):
            self.words[NAME_BASE + index] = int.from_bytes(data[8 * index : 8 * index + 8], "little")

    def set_depth(self, depth: int) -> None:
        """How much the device has before it now."""
        self.words[DEPTH] = depth

    def set_limit(self, index: int, value: int) -> None:
        """Note for a successor that a limit was changed."""
        self.words[LIMIT_BASE + index] = value + 1

    @property
    def account(self) -> Account:
        """Returns the counters."""
        return Account(memoryview(self.words))

    def allow(self, op: Op, size_bytes: int = 0, started_ns: int = 0) -> None:
        """Count an operation that was done, and keep it; timed if it is said when it began."""
        self.count(op.index, size_bytes)
        now = now_ns()
        if started_ns:
            self.sample(op.index, now - started_ns, size_bytes, now)
        else:
            self._keep(op.index | _DONE, now, size_bytes, 0)

    def deny(self, op: Op, reason: Denial, size_bytes: int = 0, started_ns: int = 0) -> None:
        """Count an operation that was refused, and keep it; timed if it is said when it began."""
        self.words[_COUNTERS + op.index * _WORDS + 1] += 1
        self.words[_DENIALS + reason.index] += 1
        now = now_ns()
        self._keep(op.index | reason.index << 8, now, size_bytes, now - started_ns if started_ns else 0)

    def count(self, index: int, size_bytes: int) -> None:
        """Count an operation by its index."""
        base = _COUNTERS + index * _WORDS
        self.words[base] += 1
        self.words[base + 2] += size_bytes

    def sample(self, index: int, nanoseconds: int, size_bytes: int, now: int) -> None:
        """Count one latency of the operation with this index, and keep the operation, which ended at `now`."""
        left = nanoseconds
        bucket = 0
        while left and bucket < _BUCKETS - 1:
            left >>= 1
            bucket += 1
        self.words[_COUNTERS + index * _WORDS + 3 + bucket] += 1
        self._keep(index | _DONE, now, size_bytes, nanoseconds)

    def _keep(self, kind: int, now: int, size_bytes: int, nanoseconds: int) -> None:
        words = self.words
        number = words[_NEXT]
        base = _SLOTS + (number & _KEPT_MASK) * _SLOT
        words[base] = 0
        fence()
        words[base + 1] = now
        words[base + 2] = kind
        words[base + 3] = size_bytes
        words[base + 4] = nanoseconds
        fence()
        words[base] = number + 1
        words[_NEXT] = number + 1

    def profile(self, index: int, capability: int, quota: int, firewall: int, perform: int) -> None:
        """Keep what the stages of an operation took, in ns each."""
        words = self.words
        base = _PROFILES + index * _PROFILE
        count = words[base]
        at = base + 1 + 2 * (count & _PROFILED_MASK)
        words[at] = _bounded(capability) | _bounded(quota) << 32
        words[at + 1] = _bounded(firewall) | _bounded(perform) << 32
        words[base] = count + 1

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready: operation -> allowed, denied, bytes, latency percentiles; denials by reason."""
        return self.account.snapshot()


def _bounded(nanoseconds: int) -> int:
    """At most what 32 bits hold: four seconds."""
    return nanoseconds if nanoseconds < _U32 else _U32

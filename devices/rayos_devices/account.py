"""Where a device's figures lie: its account, ACCOUNT_BYTES of memory that others may map and read at any time.

64-bit words, each written by one store, so that a reader needs no lock and costs the device nothing:

* **who**: the layout's version, the operations that the device counts as a mask, its name;
* **counters**, per operation allowed, denied, bytes and LATENCY_BUCKETS of latency; and one per reason of denial;
* **limits**, what was set while the device ran, for a successor (`limits.py`);
* **operations**, the last OPERATIONS: every denial, and of disks and cards *sampled* ones (`stats.Stats`). A slot's
  first word is its operation's number, 0 while it is written: a reader that finds another before and behind has a torn
  entry and leaves it out;
* **profile**, per operation PROFILED samples of what each stage took, two stages a word.

The layout is that of one version of this code: `LAYOUT` in the first word says which.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from rayos_devices.gate import Denial, Op

#: Buckets of an operation's latency: below 2^n ns each, 2^35 ns (34 s) and above in the last.
LATENCY_BUCKETS: Final = 36
#: Words of an operation's counters: allowed, denied, bytes, latency buckets.
OP_WORDS: Final = 3 + LATENCY_BUCKETS
OP_COUNT: Final = len(Op)
DENIAL_COUNT: Final = len(Denial)
#: Kept operations, and words of each: number, CLOCK_MONOTONIC in ns, operation and reason, bytes, duration in ns.
OPERATIONS: Final = 256
SLOT_WORDS: Final = 5
#: Samples of an operation's stages, after how many there were ever.
PROFILED: Final = 256
PROFILE_WORDS: Final = 1 + 2 * PROFILED
LIMIT_WORDS: Final = 16

OPS: Final = 1
NAME_BASE: Final = 2
NAME_BYTES: Final = 32
COUNTER_BASE: Final = NAME_BASE + NAME_BYTES // 8
DENIAL_BASE: Final = COUNTER_BASE + OP_COUNT * OP_WORDS
#: Requests that the device has taken and not yet answered, or events that wait for the guest, when last looked at.
DEPTH: Final = DENIAL_BASE + DENIAL_COUNT
LIMIT_BASE: Final = DEPTH + 1
#: How many operations were kept ever.
NEXT: Final = LIMIT_BASE + LIMIT_WORDS
SLOT_BASE: Final = NEXT + 1
PROFILE_BASE: Final = SLOT_BASE + OPERATIONS * SLOT_WORDS
ACCOUNT_WORDS: Final = PROFILE_BASE + OP_COUNT * PROFILE_WORDS
ACCOUNT_BYTES: Final = 8 * ACCOUNT_WORDS
#: Not 0, which memory is that nobody wrote yet.
LAYOUT: Final = 1 << 48 | OP_COUNT << 32 | DENIAL_COUNT << 16 | LATENCY_BUCKETS

#: In a slot, the reason of what was done.
DONE: Final = 0xFF
PERCENTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))

_OPS: Final = tuple(Op)
_DENIALS: Final = tuple(Denial)


class Stage(IntEnum):
    """A stage that an operation goes through; the value is its place in a sample."""

    CAPABILITY = 0
    QUOTA = 1
    FIREWALL = 2
    PERFORM = 3


@dataclass(frozen=True, slots=True)
class Operation:
    """One that was kept. `at_ns` is CLOCK_MONOTONIC at its end; `duration_ns` is 0 where it was not timed."""

    number: int
    at_ns: int
    op: Op
    denial: Denial | None
    size_bytes: int
    duration_ns: int

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "number": self.number,
            "at_ns": self.at_ns,
            "operation": self.op.value,
            "outcome": "done" if self.denial is None else self.denial.value,
            "bytes": self.size_bytes,
            "duration_ns": self.duration_ns,
        }


class Account:
    """Reads one. `words` are ACCOUNT_WORDS of 64 bits; they change while they are read."""

    def __init__(self, words: memoryview) -> None:
        if len(words) != ACCOUNT_WORDS:
            raise ValueError(f"an account of {len(words)} words: it has {ACCOUNT_WORDS}")
        self.words = words

    @property
    def is_known(self) -> bool:
        """Whether a device of this version of the code has written it."""
        return self.words[0] == LAYOUT

    @property
    def name(self) -> str:
        """The device's, as far as it can be printed."""
        data = self.words[NAME_BASE:COUNTER_BASE].tobytes().rstrip(b"\0")
        return "".join(letter for letter in data.decode("ascii", "replace") if letter.isprintable())

    @property
    def ops(self) -> tuple[Op, ...]:
        """The operations that the device counts."""
        return tuple(op for op in _OPS if self.words[OPS] >> op.index & 1)

    def limit(self, index: int) -> int | None:
        """Returns the value that limit `index` was set to while the device ran; None when it was not set."""
        return self.words[LIMIT_BASE + index] - 1 if self.words[LIMIT_BASE + index] else None

    @property
    def depth(self) -> int:
        """How much the device had before it when it was last looked at."""
        value: int = self.words[DEPTH]
        return value

    def counted(self, op: Op) -> tuple[int, int, int]:
        """Allowed, denied, bytes."""
        base = COUNTER_BASE + op.index * OP_WORDS
        allowed, denied, size = self.words[base : base + 3]
        return allowed, denied, size

    def buckets(self, op: Op) -> list[int]:
        """How many sampled operations took less than 2^n ns, and not less than half of that."""
        base = COUNTER_BASE + op.index * OP_WORDS + 3
        return list(self.words[base : base + LATENCY_BUCKETS])

    def percentile(self, op: Op, fraction: float) -> int:
        """Nanoseconds that `fraction` of the sampled operations stayed below; 0 when none was sampled."""
        buckets = self.buckets(op)
        wanted = fraction * sum(buckets)
        seen = 0
        for bucket, count in enumerate(buckets):
            seen += count
            if count and seen >= wanted:
                return 1 << bucket
        return 0

    def denials(self) -> dict[str, int]:
        """Denials by reason, without those that never were."""
        counts = self.words[DENIAL_BASE : DENIAL_BASE + DENIAL_COUNT]
        return {reason.value: counts[reason.index] for reason in _DENIALS if counts[reason.index]}

    def operations(self) -> list[Operation]:
        """The kept ones, oldest first; those that are being written are left out."""
        return sorted(self._sound(), key=lambda one: one.number)

    def _sound(self) -> Iterator[Operation]:
        words = self.words
        for slot in range(OPERATIONS):
            base = SLOT_BASE + slot * SLOT_WORDS
            number, at_ns, kind, size, duration = words[base : base + SLOT_WORDS]
            if number and words[base] == number and (number - 1) % OPERATIONS == slot:
                op, reason = kind & 0xFF, kind >> 8
                if op < OP_COUNT and (reason == DONE or reason < DENIAL_COUNT):
                    denial = None if reason == DONE else _DENIALS[reason]
                    yield Operation(number, at_ns, _OPS[op], denial, size, duration)

    def profile(self, op: Op) -> dict[str, dict[str, int]]:
        """By stage, the percentiles in ns of the last PROFILED samples; empty when there was none."""
        base = PROFILE_BASE + op.index * PROFILE_WORDS
        count = min(self.words[base], PROFILED)
        if not count:
            return {}
        samples = list(self.words[base + 1 : base + 1 + 2 * count])
        stages: dict[str, dict[str, int]] = {}
        for stage in Stage:
            shift = 32 * (stage & 1)
            taken = sorted(word >> shift & 0xFFFF_FFFF for word in samples[stage >> 1 :: 2])
            stages[stage.name.lower()] = {
                name: taken[min(count - 1, int(fraction * count))] for name, fraction in PERCENTILES
            }
        return {**stages, "samples": {"kept": count, "ever": self.words[base]}}

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready: operation -> allowed, denied, bytes, latency percentiles; denials by reason."""
        operations = {}
        for op in self.ops:
            allowed, denied, size = self.counted(op)
            latency = {name: self.percentile(op, at) for name, at in PERCENTILES}
            operations[op.value] = {
                "allowed": allowed,
                "denied": denied,
                "bytes": size,
                "latency_ns": latency,
            }
        return {"operations": operations, "denials": self.denials(), "depth": self.depth}


def private_account() -> memoryview:
    """An account that nobody else sees."""
    return memoryview(array("Q", bytes(ACCOUNT_BYTES)))

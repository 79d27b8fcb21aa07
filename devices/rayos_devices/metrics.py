"""A ring of the last SAMPLES samples of what a worker does, written without locks and read in place.

64-bit words: how many samples there were ever, then slots of SAMPLE_WORDS: number, time in ns (CLOCK_MONOTONIC), and
totals until then: operations, bytes, denials, processor time in ns; and the queue depth at that moment. A slot's number
is 0 while it is written. Rates are differences of two samples.
"""

from __future__ import annotations

from array import array
from typing import Any, Final

from rayos_devices.native import fence

SAMPLES: Final = 512
SAMPLE_WORDS: Final = 7
METRICS_WORDS: Final = 1 + SAMPLES * SAMPLE_WORDS
METRICS_BYTES: Final = 8 * METRICS_WORDS
FIELDS: Final = ("number", "at_ns", "operations", "bytes", "denials", "cpu_ns", "depth")

# The same for the compiled code.
_MASK: Final = SAMPLES - 1
_WORDS: Final = SAMPLE_WORDS


class MetricsRing:
    """The writer; `page` is METRICS_BYTES, zeroed or a predecessor's."""

    def __init__(self, page: memoryview | None = None) -> None:
        self.words = (
            memoryview(array("Q", bytes(METRICS_BYTES))) if page is None else page[:METRICS_BYTES].cast("Q")
        )

    def write(
        self, at_ns: int, operations: int, size_bytes: int, denials: int, cpu_ns: int, depth: int
    ) -> None:
        """One sample more."""
        words = self.words
        number = words[0]
        base = 1 + (number & _MASK) * _WORDS
        words[base] = 0
        fence()
        words[base + 1] = at_ns
        words[base + 2] = operations
        words[base + 3] = size_bytes
        words[base + 4] = denials
        words[base + 5] = cpu_ns
        words[base + 6] = depth
        fence()
        words[base] = number + 1
        words[0] = number + 1


def read_samples(words: memoryview, last: int = SAMPLES) -> list[dict[str, Any]]:
    """The `last` samples, oldest first, from METRICS_WORDS that go on changing; torn ones are left out."""
    newest = words[0]
    samples = []
    for number in range(max(1, newest - min(last, SAMPLES) + 1), newest + 1):
        base = 1 + ((number - 1) & (SAMPLES - 1)) * SAMPLE_WORDS
        sample = words[base : base + SAMPLE_WORDS].tolist()
        if sample[0] == number == words[base]:
            samples.append(dict(zip(FIELDS, sample, strict=True)))
    return samples

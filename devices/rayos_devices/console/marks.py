"""When each byte of an output came: a ring of (offset, time) in memory that outlives the worker.

A mark says that the bytes from its offset on, up to the next mark's, came at its time; bytes within MERGE_NS of a mark
belong to it. Offsets and times only rise. As the bytes in `history.py`, marks are stored first and become true with the
count that is saved; what one publish may store spoils nothing that can be read.
"""

from __future__ import annotations

import struct
from typing import Final

_MARK: Final = struct.Struct("<QQ")
#: Marks that can be read back: hours of a person typing, some minutes of a busy log.
MARKS: Final = 32768
#: What may be stored before a save: a turn has fewer chains.
_BATCH: Final = 1024
MARKS_BYTES: Final = (MARKS + _BATCH) * _MARK.size
MERGE_NS: Final = 1_000_000

Mark = tuple[int, int]


class MarkRing:
    """A ring over MARKS_BYTES of `view`."""

    __slots__ = ("_view",)

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def _load(self, index: int) -> Mark:
        offset, time_ns = _MARK.unpack_from(self._view, index % (MARKS + _BATCH) * _MARK.size)
        return offset, time_ns

    def store(self, count: int, offset: int, now_ns: int) -> int:
        """Bytes come at `offset`; returns the number of marks with it, `count` before."""
        if count:
            _, last = self._load(count - 1)
            if now_ns < last + MERGE_NS:
                return count
        start = count % (MARKS + _BATCH) * _MARK.size
        self._view[start : start + _MARK.size] = _MARK.pack(offset, now_ns)
        return count + 1

    def between(self, count: int, start: int, end: int, limit: int) -> list[Mark]:
        """Returns the marks that the bytes from `start` to `end` need, at most `limit`. They are the last at or
        before `start`, if it is still kept, and those behind it before `end`.
        """
        low, high = max(0, count - MARKS), count
        oldest = low
        while low < high:  # the first mark behind `start`
            middle = (low + high) // 2
            if self._load(middle)[0] <= start:
                low = middle + 1
            else:
                high = middle
        found: list[Mark] = []
        for index in range(max(oldest, low - 1), count):
            mark = self._load(index)
            if (mark[0] >= end and found) or len(found) == limit:
                break
            found.append(mark)
        return found

"""Pixel memory: page-granular pieces of one memfd whose size is the quota.

Invariants: pieces never overlap; `used_bytes` is exactly the sum of the pieces, each a whole number of pages; a fresh
piece reads as zeros, and the pages of a freed one go back to the host at once (a hole is punched). What lies where is
not kept here: the owner's records say so, and a successor rebuilds the map by `reserve`.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from typing import Final

PAGE_BYTES: Final = mmap.PAGESIZE


def pages_bytes(size_bytes: int) -> int:
    """`size_bytes` rounded up to whole pages: what an allocation of it costs."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


class Heap:
    """Best-fit over the free ranges, which are kept sorted and never touch each other."""

    def __init__(self, fd: int | None, size_bytes: int) -> None:
        """`fd` is a memfd that stays the caller's and is grown to `size_bytes`; None makes a private one.

        Errors: ValueError when `size_bytes` is no positive multiple of PAGE_BYTES.
        """
        if size_bytes <= 0 or size_bytes % PAGE_BYTES:
            raise ValueError(f"a heap of {size_bytes} bytes: a positive multiple of {PAGE_BYTES} is allowed")
        own = os.memfd_create("rayos-gpu", os.MFD_CLOEXEC) if fd is None else fd
        try:
            if os.fstat(own).st_size < size_bytes:
                os.ftruncate(own, size_bytes)
            self._map = mmap.mmap(own, size_bytes)
        finally:
            if fd is None:
                os.close(own)
        self.size_bytes = size_bytes
        #: The most that may be in use; at most `size_bytes`.
        self.limit_bytes = size_bytes
        self.used_bytes = 0
        self.view = memoryview(self._map)
        self._free: list[tuple[int, int]] = [(0, size_bytes)]  # (offset, bytes)

    def allocate(self, size_bytes: int) -> int | None:
        """The offset of a zeroed piece of at least `size_bytes` (above 0); None when no free range holds it, or
        the limit does not."""
        size = pages_bytes(size_bytes)
        if self.used_bytes + size > self.limit_bytes:
            return None
        best = -1
        best_size = self.size_bytes + 1
        for index, (_, free) in enumerate(self._free):
            if size <= free < best_size:
                best, best_size = index, free
        if best < 0:
            return None
        offset, free = self._free[best]
        if free == size:
            del self._free[best]
        else:
            self._free[best] = (offset + size, free - size)
        self.used_bytes += size
        return offset

    def reserve(self, offset: int, size_bytes: int) -> bool:
        """Take exactly this piece, contents kept; False when it is not free or not inside the heap."""
        size = pages_bytes(size_bytes)
        for index, (start, free) in enumerate(self._free):
            if start <= offset and offset + size <= start + free:
                left = [(start, offset - start)] if offset > start else []
                rest = start + free - offset - size
                right = [(offset + size, rest)] if rest else []
                self._free[index : index + 1] = left + right
                self.used_bytes += size
                return True
        return False

    def free(self, offset: int, size_bytes: int) -> None:
        """Give a piece back, with the size it was allocated with; its pages go to the host."""
        size = pages_bytes(size_bytes)
        self._map.madvise(mmap.MADV_REMOVE, offset, size)
        self.used_bytes -= size
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and offset + size == self._free[index][0]:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            offset, before = self._free.pop(index - 1)
            size += before
            index -= 1
        self._free.insert(index, (offset, size))

    def forget(self) -> None:
        """Know of no piece any more, contents kept: for a successor, before it reserves."""
        self._free = [(0, self.size_bytes)]
        self.used_bytes = 0

    def scrub(self) -> None:
        """Empty the free ranges: a predecessor may have died while it wrote there."""
        for offset, size in self._free:
            self._map.madvise(mmap.MADV_REMOVE, offset, size)

    def close(self) -> None:
        """Unmap; views handed out keep the mapping alive until they are gone."""
        self.view.release()
        try:
            self._map.close()
        except BufferError:
            return  # a slice of `view` is still held: the mapping goes with it

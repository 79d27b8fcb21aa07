"""Rings of bytes named by absolute offsets, in memory that outlives the worker.

An offset counts from the first byte there ever was; the ring holds the newest. It knows no head or tail: those belong
to the state that is saved and committed (`rayos_devices.state`), the bytes beyond them are nobody's yet. So bytes
are copied in first, and become true when the state does.
"""

from __future__ import annotations

from typing import Final

#: Bytes of a port's output that can always be read back.
HISTORY_BYTES: Final = 1 << 20
#: Bytes that may be copied in before the state says so: what one publish may carry.
BATCH_BYTES: Final = 1 << 20
#: Both at once, so that a batch of which a crash made nothing spoils nothing that can be read.
OUTPUT_RING_BYTES: Final = HISTORY_BYTES + BATCH_BYTES


class ByteRing:
    """A ring over `view`, whose length is the ring's."""

    __slots__ = ("size_bytes", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.size_bytes = len(view)

    def store(self, offset: int, data: bytes | memoryview) -> None:
        """Put `data` (at most the ring's length) at an absolute offset, over what is older by a whole ring."""
        size = len(data)
        start = offset % self.size_bytes
        first = min(size, self.size_bytes - start)
        self.view[start : start + first] = data[:first]
        if first < size:
            self.view[: size - first] = data[first:]

    def pieces(self, offset: int, length: int) -> list[memoryview]:
        """The `length` bytes at an absolute offset, in one view or two."""
        start = offset % self.size_bytes
        first = min(length, self.size_bytes - start)
        out = [self.view[start : start + first]]
        if first < length:
            out.append(self.view[: length - first])
        return out

    def load(self, offset: int, length: int) -> bytes:
        """A copy of the `length` bytes at an absolute offset."""
        return b"".join(self.pieces(offset, length))


def read_back(ring: ByteRing, total: int, offset: int, limit: int) -> tuple[int, bytes]:
    """Up to `limit` bytes from `offset` of an output of `total` bytes, and the offset they really begin at.

    An offset that is too old jumps forward to the oldest byte that is kept, one beyond the end falls back to it.
    """
    start = min(max(offset, total - HISTORY_BYTES, 0), total)
    return start, ring.load(start, max(0, min(limit, total - start)))

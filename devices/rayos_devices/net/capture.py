"""A copy of what passes a port, for whoever watches: a path around the port's own, there only while somebody does.

Frames out are those that the guest sends, frames in those that the network sends; one that was refused is marked. The
copy is bounded twice: of a frame `snap` bytes are kept, and what does not fit the buffer until it is read is counted.

A record: time u64 in ns of CLOCK_MONOTONIC; bytes kept u32, bytes of the frame u32; direction u64 (INBOUND, OUTBOUND,
with DENIED); the frame without its virtio-net header, padded to 8 bytes. Little-endian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rayos_devices.native import Buffers, address_of, now_ns
from rayos_devices.net.path import Path
from rayos_devices.net.wire import HEADER_BYTES

#: To the guest, and from it, as pcapng's epb_flags count.
INBOUND: Final = 1
OUTBOUND: Final = 2
#: Beside one of those: the frame went no further.
DENIED: Final = 4
RECORD_BYTES: Final = 24
#: What waits to be read, at most.
ROOM_BYTES: Final = 1 << 20
#: Of one frame: a record fits a packet of 64 KiB.
MAX_SNAP: Final = (64 << 10) - 2 * RECORD_BYTES


class Capture:
    """The records that were copied and not read yet. `on_record` is called once, at the next record, after each
    `ask`.
    """

    def __init__(self, snap: int, on_record: Callable[[], None]) -> None:
        self._snap = snap
        self._on_record = on_record
        room = bytearray(ROOM_BYTES)
        self._address = address_of(room)
        self._room = memoryview(room)
        self._words = memoryview(room).cast("Q")
        self._start = 0
        self._end = 0
        self._is_asked = False
        self._last = -1
        #: Frames that passed, and those of them for which there was no room.
        self.seen = 0
        self.dropped = 0

    def take(self, buffers: Buffers, size: int, direction: int) -> None:
        """Keep a frame of `size` bytes with its header."""
        self.seen += 1
        original = size - HEADER_BYTES
        kept = original if original < self._snap else self._snap
        self._last = -1
        if size < HEADER_BYTES or self._end + RECORD_BYTES + kept + 7 > ROOM_BYTES:
            self.dropped += 1
            return
        word = self._end >> 3
        self._words[word] = now_ns()
        self._words[word + 1] = kept | (original << 32)
        self._words[word + 2] = direction
        self._last = word + 2
        buffers.gather(HEADER_BYTES, kept, self._address + self._end + RECORD_BYTES)
        self._end += RECORD_BYTES + ((kept + 7) & ~7)
        if self._is_asked:
            self._is_asked = False
            self._on_record()

    def take_denied(self, buffers: Buffers, size: int) -> None:
        """Keep a frame of the guest's that goes no further."""
        self.take(buffers, size, OUTBOUND | DENIED)

    def deny_last(self) -> None:
        """Mark the frame that was taken last, unless it is read already or was lost: it goes no further."""
        if self._last >= 0:
            self._words[self._last] |= DENIED

    def read(self, limit: int) -> bytes:
        """Whole records, the oldest first, in at most `limit` bytes (one always fits MAX_SNAP + 2 * RECORD_BYTES)."""
        start = self._start
        at = start
        while at < self._end:
            following = at + RECORD_BYTES + ((int(self._words[(at >> 3) + 1]) & 0xFFFF_FFFF) + 7 & ~7)
            if following - start > limit:
                break
            at = following
        data = bytes(self._room[start:at])
        self._last = -1
        self._start = at
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start > ROOM_BYTES // 2:
            rest = bytes(self._room[self._start : self._end])
            self._room[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return data

    def ask(self) -> None:
        """Call `on_record` when there is something to read."""
        self._is_asked = True


class CapturePath(Path):
    """The path `inner`, watched."""

    def __init__(self, inner: Path, capture: Capture) -> None:
        self.inner = inner
        self.capture = capture

    def send(self, buffers: Buffers) -> int:
        size = buffers.total
        result = self.inner.send(buffers)
        if result >= 0:
            self.capture.take(buffers, size, OUTBOUND)
        return result

    def receive(self, buffers: Buffers) -> int:
        size = self.inner.receive(buffers)
        if size >= 0:
            self.capture.take(buffers, size, INBOUND)
        return size

    def flush(self) -> None:
        self.inner.flush()

    def has_frame(self) -> bool:
        return self.inner.has_frame()

    def set_awake(self, awake: bool) -> None:
        self.inner.set_awake(awake)

"""Frames that wait inside a process: behind the echo, and between two ports that are joined without a tap.

One block of memory, frames one behind the other, the oldest given up when there is no room: as a switch does it.
"""

from __future__ import annotations

import os
from typing import Final

from devices.native import Buffers, address_of, copy, signal, take_signal
from devices.net.wire import HEADER_BYTES

#: Frames that wait at most, and their bytes.
LIMIT: Final = 1024
ROOM_BYTES: Final = 4 << 20
LIMIT_MASK: Final = LIMIT - 1
ADDRESS_BYTES: Final = 6


class FrameQueue:
    """`fd` is readable while frames wait (once `pop` found none it has to be told again)."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        room = bytearray(ROOM_BYTES + ADDRESS_BYTES)
        self._address = address_of(room)
        self._room = memoryview(room)
        self._starts = memoryview(bytearray(8 * LIMIT)).cast("Q")
        self._sizes = memoryview(bytearray(8 * LIMIT)).cast("Q")
        self._first = 0
        self._count = 0
        self._end = 0
        self._is_told = False
        self._is_awake = False
        #: Frames given up for newer ones.
        self.lost = 0

    def push(self, buffers: Buffers) -> int:
        """Keep a copy of a frame with its header; its bytes."""
        size = buffers.total
        if self._count == 0:
            self._end = 0  # memory that was just read from is still in the cache
        start = self._end
        if start + size > ROOM_BYTES:
            while self._count and self._starts[self._first & LIMIT_MASK] >= start:
                self._drop()
            start = 0
        while self._count == LIMIT or (self._count and self._is_in_the_way(start, size)):
            self._drop()
        buffers.gather(0, size, self._address + start)
        slot = (self._first + self._count) & LIMIT_MASK
        self._starts[slot] = start
        self._sizes[slot] = size
        self._count += 1
        self._end = start + size
        if not (self._is_told or self._is_awake):
            self._is_told = True
            signal(self.fd)
        return size

    def _is_in_the_way(self, start: int, size: int) -> bool:
        slot = self._first & LIMIT_MASK
        return self._starts[slot] < start + size and start < self._starts[slot] + self._sizes[slot]

    def _drop(self) -> None:
        self._first += 1
        self._count -= 1
        self.lost += 1

    def swap_addresses(self) -> None:
        """Exchange the Ethernet addresses of the frame pushed last, which has both."""
        slot = (self._first + self._count - 1) & LIMIT_MASK
        at = self._address + self._starts[slot] + HEADER_BYTES
        spare = self._address + ROOM_BYTES
        copy(spare, at, ADDRESS_BYTES)
        copy(at, at + ADDRESS_BYTES, ADDRESS_BYTES)
        copy(at + ADDRESS_BYTES, spare, ADDRESS_BYTES)

    def pop(self, buffers: Buffers) -> int:
        """Move the oldest frame into the buffers; its bytes, 0 when there is none."""
        if self._count == 0:
            if self._is_told:
                self._is_told = False
                take_signal(self.fd)
            return 0
        slot = self._first & LIMIT_MASK
        size = buffers.scatter(0, self._sizes[slot], self._address + self._starts[slot])
        self._first += 1
        self._count -= 1
        return size

    def has_frame(self) -> bool:
        return self._count > 0

    def set_awake(self, awake: bool) -> None:
        """Whether the receiver looks by itself; else a frame that waits is told."""
        self._is_awake = awake
        if self._count and not (awake or self._is_told):
            self._is_told = True
            signal(self.fd)

    def close(self) -> None:
        os.close(self.fd)

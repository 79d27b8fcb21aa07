"""Frames inside a process, from one ring to another: behind the echo, and between two ports joined without a tap.

A frame for which the receiving ring has a chain goes right there, copied once. Others wait: one block of memory, frames
one behind the other, the oldest given up when there is no room, as a switch does it.
"""

from __future__ import annotations

import os
from typing import Final, cast

from rayos_devices.native import Buffers, address_of, signal, swap, take_signal
from rayos_devices.net.wire import HEADER_BYTES

#: Frames that wait at most, and their bytes.
LIMIT: Final = 1024
ROOM_BYTES: Final = 4 << 20
LIMIT_MASK: Final = LIMIT - 1
ADDRESS_BYTES: Final = 6


class Inlet:
    """Who takes frames as they come."""

    def accept(self, buffers: Buffers, is_echo: bool) -> bool:
        """Take a frame with its header, with its Ethernet addresses exchanged if `is_echo`; False: not now."""
        return False

    def flush(self) -> None:
        """No more frames for now: tell the driver of those that were accepted."""


class FrameQueue:
    """`fd` is readable while frames wait (once `pop` found none it has to be told again). An echo exchanges the
    Ethernet addresses of each."""

    def __init__(self, *, is_echo: bool = False) -> None:
        self._is_echo = is_echo
        self._inlet = cast("Inlet", None)
        self._has_inlet = False
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        room = bytearray(ROOM_BYTES)
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

    def set_inlet(self, inlet: Inlet | None) -> None:
        """Who takes a frame at once when none waits before it; None: they all wait."""
        self._inlet = cast("Inlet", inlet)
        self._has_inlet = inlet is not None

    def push(self, buffers: Buffers) -> int:
        """Pass on or keep a copy of a frame with its header; its bytes."""
        size = buffers.total
        if self._count == 0:
            if self._has_inlet and self._inlet.accept(buffers, self._is_echo):
                return size
            self._end = 0  # memory that was just read from is still in the cache
        start = self._end
        if start + size > ROOM_BYTES:
            while self._count and self._starts[self._first & LIMIT_MASK] >= start:
                self._drop()
            start = 0
        while self._count == LIMIT or (self._count and self._is_in_the_way(start, size)):
            self._drop()
        buffers.gather(0, size, self._address + start)
        if self._is_echo and size >= HEADER_BYTES + 2 * ADDRESS_BYTES:
            swap(self._address + start + HEADER_BYTES)
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

    def flush(self) -> None:
        """Nothing more is pushed for now."""
        if self._has_inlet:
            self._inlet.flush()

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

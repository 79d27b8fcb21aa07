"""A network card's other side in a test: what was sent, and what arrives."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress

from rayos_devices.net.port import SinkPort
from rayos_devices.net.wire import MAX_FRAME_BYTES


class Wire(SinkPort):
    """Remembers what was sent; delivers what is in `incoming` (frames with their headers)."""

    longest = MAX_FRAME_BYTES

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.incoming: deque[bytes] = deque()

    def send(self, buffers: list[memoryview]) -> None:
        self.sent.append(b"".join(buffers))

    def arrive(self, *frames: bytes) -> None:
        self.incoming.extend(frames)
        os.eventfd_write(self.fileno(), 1)

    def receive(self, buffers: list[memoryview]) -> int:
        if not self.incoming:
            with suppress(BlockingIOError):
                os.eventfd_read(self.fileno())
            raise BlockingIOError
        frame = self.incoming.popleft()
        done = 0
        for buffer in buffers:
            piece = frame[done : done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        assert done == len(frame), "the device gave too little room: the frame would be cut"
        return done

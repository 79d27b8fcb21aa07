"""A port's path with faults on it: frames are lost or late, out and in."""

from __future__ import annotations

from typing import Final

from rayos_devices.faults import Faults
from rayos_devices.gate import Denial, Op
from rayos_devices.loop import Loop
from rayos_devices.native import Buffers, address_of
from rayos_devices.net.outcome import EMPTY
from rayos_devices.net.path import Path
from rayos_devices.stats import Stats

#: Frames that may be late at a time; more are lost, as in a router whose queue is full.
MAX_LATE: Final = 1024
#: Frames that may be lost on their way in before others get a turn.
MAX_LOST: Final = 64


class FaultyPath(Path):
    """Stands before `path`. A frame that is lost or late on its way out is taken: the guest knows no difference."""

    def __init__(self, path: Path, faults: Faults, loop: Loop, stats: Stats) -> None:
        self.path = path
        self._faults = faults
        self._loop = loop
        self._stats = stats
        self._late = 0

    def send(self, buffers: Buffers) -> int:
        fault = self._faults.decide("tx")
        if fault is None:
            return self.path.send(buffers)
        size = buffers.total
        if fault.action == "delay" and self._late < MAX_LATE:
            frame = bytearray(size)
            buffers.gather(0, size, address_of(frame))
            self._late += 1
            self._loop.call_at(self._loop.now() + fault.delay_s, lambda: self._send_late(frame))
        return size

    def _send_late(self, frame: bytearray) -> None:
        self._late -= 1
        buffers = Buffers()
        buffers.add(address_of(frame), len(frame))
        self.path.send(buffers)  # what became of it was told when it was taken
        self.path.flush()

    def flush(self) -> None:
        self.path.flush()

    def receive(self, buffers: Buffers) -> int:
        for _ in range(MAX_LOST):
            size = self.path.receive(buffers)
            fault = self._faults.decide("rx") if size > 0 else None
            if fault is None:
                return size
            if fault.action == "full":
                self._stats.deny(Op.NET_RX, Denial.QUEUE_FULL)
        return EMPTY  # the others get their turn; what waits is asked for again

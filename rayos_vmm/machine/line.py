"""A line of the machine's board that a kernel writes to without a driver: a serial port, or a debug console.

QEMU listens for us on a socket of the machine's; what came out outlives the machine's end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import trio

from rayos_vmm.config.spec import LINE_NAMES
from rayos_vmm.errors import GuestGone
from rayos_vmm.machine.history import History

#: The console port by which the API reaches COM1; 0 to 30 are the virtio console's, the other lines follow.
SERIAL_PORT: Final = 31
LINE_PORTS: Final = {name: SERIAL_PORT + index for index, name in enumerate(LINE_NAMES)}


def line_socket(runtime: Path, name: str) -> Path:
    """Where QEMU listens for a line's reader."""
    return runtime / f"{name}.sock"


class Line:
    """One line while the machine runs, and what it has said when it does not."""

    def __init__(self, vm: str, name: str) -> None:
        self.name = name
        self.port = LINE_PORTS[name]
        self.history = History()
        self.stream: trio.SocketStream | None = None
        self._vm = vm
        self._lock = trio.Lock()

    async def send(self, data: bytes) -> None:
        """Types into the line; waits for room.

        Raises:
            GuestGone: it is not connected, or was closed.
        """
        if self.stream is None:
            raise GuestGone(f"{self._vm}: its {self.name} line is not connected")
        try:
            async with self._lock:
                await self.stream.send_all(data)
        except trio.BrokenResourceError:
            raise GuestGone(f"{self._vm}: its {self.name} line was closed") from None

    def close(self) -> None:
        """No more will come."""
        self.stream = None
        self.history.close()

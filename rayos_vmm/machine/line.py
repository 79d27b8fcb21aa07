"""A line of the machine's board that a kernel writes to without a driver: a serial port, or a debug console.

QEMU listens for us on a socket of the machine's; what came out outlives the machine's end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import trio

from rayos_vmm.config.spec import LINE_NAMES
from rayos_vmm.errors import GuestGone
from rayos_vmm.machine.history import CONSOLE_FILE_BYTES, BoundedFile, History

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

    def keep_in(self, directory: Path, *, is_continued: bool) -> None:
        """Has all that comes written to a file of `directory`, and what is there read from it (`History.keep_in`)."""
        path = directory / f"{self.name}.log"
        self.history.keep_in(BoundedFile(path, limit=CONSOLE_FILE_BYTES, is_continued=is_continued))

    def recall(self, directory: Path) -> None:
        """Makes what it said in runs that a former service saw readable; nothing more will come."""
        if (directory / f"{self.name}.log").exists():
            self.keep_in(directory, is_continued=True)
            self.close()

    def close(self) -> None:
        """No more will come."""
        self.stream = None
        self.history.close()

"""The remains of a guest that ended: its last frame, its counters, and the output of its console ports.

They are saved when QEMU is gone and the device worker still holds them, into the machine's state directory, and lie
there until the next start or the machine's removal. The serial line has a file of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from rayos_vmm.hardware.protocols import Worker
from rayos_vmm.machine.png import encode_png
from rayos_vmm.shared.packet import WorkerError, WorkerGone
from rayos_vmm.shared.timed import Span

_FOLDER: Final = "last"
_FRAME: Final = "frame.png"
_STATS: Final = "stats.json"
#: Saving takes no longer than this: whoever waits for the end is told at once.
_LIMIT_S: Final = 1.0


class Remains:
    """The remains of one machine. Every reader returns None when nothing of the kind was left."""

    def __init__(self, state_directory: Path) -> None:
        self._folder = state_directory / _FOLDER

    def forget(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def save(self, worker: Worker) -> None:
        """Saves as much as the worker still tells within a second; errors leave the rest out."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with trio.move_on_after(_LIMIT_S):
            for save in (self._save_stats, self._save_consoles, self._save_frame):
                with suppress(WorkerError, WorkerGone, OSError):
                    await save(worker)

    async def _save_stats(self, worker: Worker) -> None:
        self._write(_STATS, msgspec.json.encode(await worker.stats()))

    async def _save_frame(self, worker: Worker) -> None:
        frame = await worker.screenshot(0, with_cursor=True)
        if frame.serial:
            self._write(
                _FRAME,
                await trio.to_thread.run_sync(
                    encode_png, frame.width, frame.height, frame.stride, frame.pixels
                ),
            )

    async def _save_consoles(self, worker: Worker) -> None:
        for port in await worker.ports():
            number = int(port.port)
            async with worker.console_pieces(number, since=0, follow=False) as pieces:
                lines = [msgspec.json.encode(piece) + b"\n" async for piece in pieces]
            if lines:
                self._write(f"port-{number}.jsonl", b"".join(lines))

    def _write(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.touch(mode=0o600)
        path.write_bytes(data)

    def _read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return None

    def stats(self) -> Mapping[str, Any] | None:
        """Returns the last counters of the devices."""
        data = self._read(_STATS)
        return None if data is None else msgspec.json.decode(data, type=dict[str, Any])

    def frame(self) -> bytes | None:
        """Returns the last picture of the first monitor as a PNG."""
        return self._read(_FRAME)

    async def spans(self, port: int, since: int) -> AsyncGenerator[Span, None]:
        """Yields the kept output of a console port from offset `since` on; nothing when there is none."""
        for line in (self._read(f"port-{port}.jsonl") or b"").splitlines():
            span = msgspec.json.decode(line, type=Span)
            if span.offset + len(span.data) > since:
                yield span

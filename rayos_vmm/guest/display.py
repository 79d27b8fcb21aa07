"""One machine's display: what its monitors show, what of that changed, and the modes that they offer."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import trio

from rayos_vmm.errors import Timeout_
from rayos_vmm.machine.machine import PICTURE, Machine, worker_errors
from rayos_vmm.machine.png import encode_png
from rayos_vmm.machine.view import Damage
from rayos_vmm.qemu.display_events import open_display_events
from rayos_vmm.shared.packet import WorkerError, WorkerGone
from rayos_vmm.shared.view import DisplayInfo

MAX_PICTURE_BYTES: Final = 128 << 20


class MachineDisplay:
    """One machine's display. Every method raises Conflict while the machine does not run, GuestGone when its devices
    are not there, and Invalid for a scanout that it does not have.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def info(self) -> DisplayInfo:
        """`serial` of the newest change, and `scanouts`: mode, picture, cursor of each.

        Raises:
            NotFound: it has no GPU.
        """
        async with self._machine.alive():
            return await self._machine.need_worker().display_info()

    async def wait_damage(self, since: int, scanout: int = 0, timeout_s: float = 60.0) -> Damage:
        """Waits for damage on a scanout after serial `since` (0: ever) and returns it. It waits across a worker's
        death too, after which the whole picture counts as changed.

        A guest without a driver for our GPU (a plain VGA screen) never damages it.

        Raises:
            Timeout_: nothing changed within `timeout_s`.
        """
        async with self._machine.alive():
            worker = self._machine.need_worker()
            with trio.move_on_after(timeout_s):
                serial, x, y, width, height = await worker.wait_damage(since, scanout)
                return Damage(serial=serial, scanout=scanout, x=x, y=y, width=width, height=height)
        raise Timeout_(
            f"{self._machine.name}: nothing changed on scanout {scanout} within {timeout_s:g} s after {since}"
        )

    async def resize(self, width: int, height: int, scanout: int = 0) -> None:
        """Gives a monitor another preferred mode, and tells the guest to look; what it does about it is its own matter.

        The mode outlives the guest's reset and the worker, not the machine's stop.

        Raises:
            NoDisplayEvents: a running guest of this QEMU cannot be told; nothing was changed.
        """
        machine = self._machine
        worker, qmp = machine.need_worker(), machine.need_qmp()
        async with machine.display_lock, open_display_events(qmp) as display_events:
            with worker_errors(machine):
                await worker.gpu_resize(scanout, width, height)
            await display_events.announce_size(scanout, width, height)

    async def screenshot(self, scanout: int = 0, *, with_cursor: bool = False) -> bytes:
        """A monitor's picture as a PNG: our GPU's, or QEMU's while the guest shows a plain VGA screen.

        Of a machine that ended it is the last one of the first monitor.
        """
        machine = self._machine
        if not machine.is_live and (last := machine.remains.frame()) is not None:
            return last
        async with machine.alive():
            return await self._picture(scanout, with_cursor=with_cursor)

    async def _picture(self, scanout: int, *, with_cursor: bool) -> bytes:
        machine = self._machine
        if machine.worker is not None:
            try:
                frame = await machine.worker.screenshot(scanout, with_cursor=with_cursor)
            except (WorkerError, WorkerGone) as error:
                if scanout or (isinstance(error, WorkerError) and error.denied):
                    with worker_errors(machine):
                        raise
            else:
                if frame.serial or scanout:  # the guest's driver has shown something
                    return await trio.to_thread.run_sync(
                        encode_png, frame.width, frame.height, frame.stride, frame.pixels
                    )
        qmp = machine.need_qmp()
        path = machine.runtime / PICTURE
        async with machine.picture_lock:
            await qmp.execute("screendump", {"filename": str(path), "format": "png"})
            return await trio.to_thread.run_sync(_take, path)


def _take(path: Path) -> bytes:
    """Takes the picture that QEMU wrote, at most MAX_PICTURE_BYTES of it, and keeps nothing."""
    with path.open("r+b") as file:
        data = file.read(MAX_PICTURE_BYTES)
        file.truncate(0)
    return data

"""The monitors of one GPU: what each shows, in which mode, with which cursor, and what of it changed.

Everything that ends in a picture: QEMU's consoles follow by `display`, our own viewers by `damage` and `frame`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayos_devices.errors import DeniedError, RequestError
from rayos_devices.gate import Gate, Op
from rayos_devices.gpu.blend import blend
from rayos_devices.gpu.damage import Damage, DamageLog
from rayos_devices.gpu.display import Display
from rayos_devices.gpu.scanout import Cursor, Scanout, ScanoutFrame
from rayos_devices.gpu.wire import PIXEL_BYTES, Rect
from rayos_devices.loop import Loop
from rayos_devices.native import now_ns
from rayos_devices.stats import Stats


class Screen:
    """`scanouts` monitors of `width` by `height` pixels, whose pictures lie in `pixels` (the heap)."""

    def __init__(
        self, loop: Loop, pixels: memoryview, scanouts: int, width: int, height: int, stats: Stats, gate: Gate
    ) -> None:
        self.scanouts = [Scanout(index, width, height) for index in range(scanouts)]
        self.display = Display(loop, pixels, self.scanouts)
        self.damage = DamageLog(scanouts)
        self._pixels = pixels
        self._stats = stats
        self._gate = gate

    # -- what the guest changes ----------------------------------------------------------------------------------

    def show(self, scanout: Scanout) -> None:
        """A scanout was switched on, off or to another picture."""
        self.display.change(scanout.index)
        self.damage.add((scanout.index, scanout.whole))

    def flush(self, parts: list[tuple[int, Rect]]) -> None:
        """The pixels of these parts, relative to their scanouts, are new."""
        for index, part in parts:
            self.display.damage(index, part)
        if parts:
            self.damage.add(*parts)

    def switch_off(self) -> None:
        """No driver shows anything any more."""
        for scanout in self.scanouts:
            scanout.switch_off()
            scanout.hide_cursor()
            self.display.move_cursor(scanout.index, is_new=True)
            self.show(scanout)

    @property
    def is_off(self) -> bool:
        return all(shown.resource is None and not shown.is_cursor_shown for shown in self.scanouts)

    def show_again(self) -> None:
        """Everything anew, to whoever looks: a successor took over."""
        for scanout in self.scanouts:
            self.display.change(scanout.index)
            self.display.move_cursor(scanout.index, is_new=True)

    # -- what the host's side sees -------------------------------------------------------------------------------

    def scanout(self, index: int) -> Scanout:
        """Errors: RequestError when there is none of that number."""
        if not 0 <= index < len(self.scanouts):
            raise RequestError(f"scanout {index}: 0 to {len(self.scanouts) - 1} are there")
        return self.scanouts[index]

    def frame(self, index: int = 0, *, with_cursor: bool = False) -> ScanoutFrame:
        """Returns the present picture of a monitor; black in its mode while the guest has it off.

        Errors: RequestError when there is no such scanout, or the gate denies the read-back.
        """
        started = now_ns()
        shown = self.scanout(index)
        _, _, width, height = shown.whole
        size = width * height * PIXEL_BYTES
        denial = self._gate.check(Op.GPU_READBACK, size)
        if denial is not None:
            self._stats.deny(Op.GPU_READBACK, denial, size, started)
            raise DeniedError(
                Op.GPU_READBACK.value, f"reading a picture of {size} bytes back is denied ({denial.value})"
            )
        pixels = bytes(size) if shown.resource is None else shown.picture(self._pixels)
        cursor = self.cursor(index) if with_cursor else None
        if cursor is not None:
            pixels = blend(pixels, width, height, cursor)
        self._stats.allow(Op.GPU_READBACK, size, started)
        return ScanoutFrame(width, height, width * PIXEL_BYTES, pixels, self.damage.serial)

    def damage_since(self, serial: int, index: int = 0) -> Damage | None:
        """Returns the damage of a monitor after `serial`; None when there is none. Errors: RequestError as `frame`."""
        return self.damage.since(serial, index, self.scanout(index).whole)

    def cursor(self, index: int = 0) -> Cursor | None:
        """The cursor plane; None while it is hidden, or its shape died with a predecessor."""
        shown = self.scanout(index)
        if not shown.cursor_pixels:
            return None
        return Cursor(shown.cursor_x, shown.cursor_y, shown.hot_x, shown.hot_y, shown.cursor_pixels)

    def resize(self, index: int, width: int, height: int, check: Callable[[int, int], None]) -> None:
        """Give a monitor another mode. Errors: RequestError as `frame`; what `check` raises."""
        shown = self.scanout(index)
        check(width, height)
        is_black = shown.resource is None
        shown.width, shown.height = width, height
        if is_black:
            self.damage.add((index, shown.whole))

    def snapshot(self) -> list[dict[str, Any]]:
        """Returns the state of each monitor, JSON-ready."""
        return [
            {
                "scanout": shown.index,
                "mode": {"width": shown.width, "height": shown.height},
                "is_on": shown.resource is not None,
                "picture": {"width": shown.whole.width, "height": shown.whole.height},
                "cursor": {"x": shown.cursor_x, "y": shown.cursor_y} if shown.is_cursor_shown else None,
            }
            for shown in self.scanouts
        ]

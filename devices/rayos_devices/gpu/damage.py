"""Damage since a serial: the newest rectangles of each scanout.

Serials rise with every change of a picture that is shown, over all scanouts together, and never fall: a successor
begins a generation higher (`next_generation`). Whoever asks about a serial that is older than what is kept, or of a
predecessor, is told that the whole picture changed, so nobody ever misses a change and nothing grows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from rayos_devices.gpu.wire import Rect

#: Rectangles kept for each scanout: a second of a busy screen.
KEPT: Final = 64
_GENERATION_BITS: Final = 32


class Damage(NamedTuple):
    """`rect` holds all that changed on a scanout since the serial asked about; `serial` is the one to ask with next."""

    serial: int
    rect: Rect


class DamageLog:
    """The changes of `scanouts` pictures. `on_damage` is called with each new serial."""

    def __init__(self, scanouts: int) -> None:
        self.serial = 0
        self.on_damage: Callable[[int], object] | None = None
        self._log: list[deque[Damage]] = [deque(maxlen=KEPT) for _ in range(scanouts)]
        #: The newest change that was forgotten: before it nothing is known.
        self._forgotten = [0] * scanouts

    def add(self, *changes: tuple[int, Rect]) -> None:
        """One change: scanouts (each once) and what of them, relative to the scanout, is new."""
        self.serial += 1
        for scanout, rect in changes:
            log = self._log[scanout]
            if len(log) == KEPT:
                self._forgotten[scanout] = log[0].serial
            log.append(Damage(self.serial, rect))
        if self.on_damage is not None:
            self.on_damage(self.serial)

    def since(self, serial: int, scanout: int, whole: Rect) -> Damage | None:
        """Returns the damage after `serial` of a scanout whose picture is `whole`; None when there is none."""
        if serial < self._forgotten[scanout]:
            return Damage(self.serial, whole)
        found: Rect | None = None
        for change in reversed(self._log[scanout]):
            if change.serial <= serial:
                break
            found = change.rect if found is None else found.union(change.rect)
        if found is None:
            return None
        # Rectangles of a picture that was larger then.
        return Damage(self.serial, found.intersection(whole) or whole)

    def next_generation(self, before: int) -> None:
        """Go on after a predecessor whose last known serial was `before`: no serial is given twice."""
        self.serial = ((before >> _GENERATION_BITS) + 1) << _GENERATION_BITS
        for log in self._log:
            log.clear()
        self._forgotten = [self.serial] * len(self._log)

"""Tells a guest that hangs, or that was given time enough, from one that works: limits by progress, not by guessing.

Theory of operation: `check` is called at `deadline()` with a mark that is different whenever the guest did something
that a program does: wrote to a console, used its disk, sent a frame. (A cursor that blinks is no progress, nor is what
others send to the guest.) A guest whose mark stays the same for `silence_s` hangs; one that runs for `run_s` has timed
out, whatever it does. A silence is noticed within a quarter of its length.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Final

from rayos_vmm.machine.view import ExitReason

LOOKS: Final = 4  # in the time of one silence
_PROGRESS: Final = frozenset(
    {"console.write", "disk.read", "disk.write", "disk.flush", "disk.format", "net.tx"}
)


class Watchdog:
    """One run of one guest. All times in seconds of one steady clock; a limit of 0 is none."""

    def __init__(self, *, silence_s: float, run_s: float, now: float) -> None:
        self.silence_s = silence_s
        self.run_s = run_s
        self._end = now + run_s if run_s else float("inf")
        self._mark: Hashable = None
        self._moved = now
        self._next = now + silence_s / LOOKS if silence_s else float("inf")

    def deadline(self) -> float:
        """When to look next; infinite when there is no limit."""
        return min(self._next, self._end)

    def check(self, mark: Hashable, now: float) -> tuple[ExitReason, str] | None:
        """Why the guest has to end, or None."""
        if now >= self._end:
            return ExitReason.TIMED_OUT, f"it ran for the {self.run_s:g} s that it was given"
        if mark != self._mark:
            self._mark, self._moved = mark, now
        if self.silence_s and now - self._moved >= self.silence_s:
            silence = f"{now - self._moved:.1f} s without console output, disk or network request"
            return ExitReason.HANG, f"the guest hangs: {silence}; {self.silence_s:g} s are allowed"
        self._next = now + self.silence_s / LOOKS if self.silence_s else float("inf")
        return None


def progress(stats: Mapping[str, Any]) -> int:
    """How many of the operations that count as progress the devices have done, from their statistics."""
    return sum(
        counted["allowed"] + counted["denied"]
        for device in stats.values()
        for name, counted in device.get("operations", {}).items()
        if name in _PROGRESS
    )

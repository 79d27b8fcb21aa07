"""Tells the service that a disk refused writes for want of room, and whose room it was: its quota's or the host's.

A guest may retry for ever: the first refusal is told at once, those of the PERIOD behind it as one sum at its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from rayos_devices.backend import Backend
from rayos_devices.blk.backend import BlkBackend
from rayos_devices.loop import Loop

#: Seconds for which refusals are summed up.
PERIOD: Final = 60.0


def watch_fullness(loop: Loop, backends: Sequence[Backend], tell: Callable[[dict[str, Any]], None]) -> None:
    """Listen to the disks among the backends."""
    for backend in backends:
        if isinstance(backend, BlkBackend):
            backend.store.on_full = _Disk(loop, backend, tell).ran_full


class _Disk:
    def __init__(self, loop: Loop, disk: BlkBackend, tell: Callable[[dict[str, Any]], None]) -> None:
        self._loop = loop
        self._disk = disk
        self._tell = tell
        self._refused: Counter[str] = Counter()
        self._is_quiet = False

    def ran_full(self, why: str) -> None:
        self._refused[why] += 1
        if not self._is_quiet:
            self._is_quiet = True
            self._loop.call_soon(self._report)

    def _report(self) -> None:
        self._is_quiet = bool(self._refused)
        for why, count in self._refused.items():
            self._tell(
                {
                    "event": "disk_full",
                    "device": self._disk.name,
                    "why": why,
                    "count": count,
                    "used_bytes": self._disk.store.allocated_bytes,
                    "quota_bytes": self._disk.quota_bytes,
                }
            )
        self._refused.clear()
        if self._is_quiet:
            self._loop.call_at(self._loop.now() + PERIOD, self._report)

"""What the worker takes from the gate page beside the mask: how fast its devices may be, and whose use is recorded.

The page is the truth: a worker applies it when it starts, and again when the service says that there is news, so a
successor knows all that its predecessor was told. Once a second it tells in sums what was done of the operations that
have to be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from devices.backend import Backend
from devices.blk.backend import BlkBackend
from devices.gate import Gate, Op
from devices.loop import Loop
from devices.net.backend import NetBackend

#: Words of the page behind mask and revision (`rayos_vmm/policy/compile.py` writes them); rates in bytes a second.
AUDITED: Final = 2
NET_RATE: Final = 3
DISK_RATE: Final = 4
PERIOD: Final = 1.0


class Obedience:
    """Keeps the backends at what the page says. Without a page there is nothing to obey."""

    def __init__(
        self, loop: Loop, backends: Sequence[Backend], gate: Gate, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._loop = loop
        self._backends = backends
        self._gate = gate
        self._tell = tell
        self._applied = (0, 0)
        self._seen: dict[tuple[str, str], int] = {}
        self._is_watching = False
        self.apply()

    def apply(self) -> int:
        """Does what the page says now; returns the revision that it is of."""
        mask = self._gate.mask
        if len(mask) <= DISK_RATE:
            return 0
        revision, audited, rates = mask[1], mask[AUDITED], (mask[NET_RATE], mask[DISK_RATE])
        if rates != self._applied:
            self._applied = rates
            for backend in self._backends:
                if isinstance(backend, NetBackend):
                    backend.limit_rate(float(rates[0]))
                elif isinstance(backend, BlkBackend):
                    backend.limit_rate(float(rates[1]))
        if audited and not self._is_watching:
            self._is_watching = True
            self._seen = dict(self._used())
            self._loop.call_at(self._loop.now() + PERIOD, self.look)
        return int(revision)

    def _used(self) -> list[tuple[tuple[str, str], int]]:
        """How often each operation was done that has to be recorded, by device and operation."""
        audited = self._gate.mask[AUDITED]
        found = []
        for backend in self._backends:
            counted = backend.stats.snapshot()["operations"]
            for word, counts in counted.items():
                if audited >> Op(word).index & 1:
                    found.append(((backend.name, word), int(counts["allowed"])))
        return found

    def look(self) -> None:
        """Tells what was done since the last look."""
        used = dict(self._used())
        news: dict[str, dict[str, int]] = {}
        for (device, word), count in used.items():
            if more := count - self._seen.get((device, word), 0):
                news.setdefault(device, {})[word] = more
        self._seen = used
        for device, operations in news.items():
            self._tell({"event": "used", "device": device, "operations": operations})
        self._is_watching = bool(self._gate.mask[AUDITED])
        if self._is_watching:
            self._loop.call_at(self._loop.now() + PERIOD, self.look)

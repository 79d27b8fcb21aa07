"""The worker's reading of the gate page beside the mask: ceilings of its devices, and operations whose use is recorded.

The page is the truth: a worker applies it when it starts, and again when the service says that there is news, so a
successor knows all that its predecessor was told. Once a second it tells in sums what was done of the operations that
have to be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.gate import Gate, Op
from rayos_devices.loop import Loop
from rayos_vmm.shared.gate import (
    AUDITED,
    DISK_AT_ONCE,
    DISK_RATE,
    DISK_SIZE,
    GPU_MEMORY,
    INPUT_QUEUE,
    NET_RATE,
)
from rayos_vmm.shared.packet import Head

#: The page's words by the names that devices know them by (`Backend.apply_ceilings`).
_CEILINGS: Final = {
    "net_rate": NET_RATE,
    "disk_rate": DISK_RATE,
    "disk_size": DISK_SIZE,
    "gpu_memory": GPU_MEMORY,
    "input_queue": INPUT_QUEUE,
    "disk_at_once": DISK_AT_ONCE,
}
PERIOD: Final = 1.0


class Ceilings:
    """Keeps the backends at what the page says. Without a page there are none."""

    def __init__(
        self, loop: Loop, backends: Sequence[Backend], gate: Gate, tell: Callable[[Head], None]
    ) -> None:
        self._loop = loop
        self._backends = backends
        self._gate = gate
        self._tell = tell
        self._applied = dict.fromkeys(_CEILINGS, 0)
        self._seen: dict[tuple[str, str], int] = {}
        self._is_watching = False
        self.apply()

    def apply(self) -> int:
        """Does what the page says now; returns the revision that it is of."""
        mask = self._gate.mask
        if len(mask) <= DISK_AT_ONCE:
            return 0
        revision, audited = mask[1], mask[AUDITED]
        ceilings = {name: int(mask[word]) for name, word in _CEILINGS.items()}
        if ceilings != self._applied:
            self._applied = ceilings
            for backend in self._backends:
                backend.apply_ceilings(ceilings)
        if audited and not self._is_watching:
            self._is_watching = True
            self._seen = dict(self._used())
            self._loop.call_at(self._loop.now() + PERIOD, self.report)
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

    def report(self) -> None:
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
            self._loop.call_at(self._loop.now() + PERIOD, self.report)

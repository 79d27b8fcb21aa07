"""Tells the service of new flows that firewall rules with `log` or `audit_only` matched: some, and how many more.

A guest can begin any number of flows, so at most AT_ONCE are told in a PERIOD and the others are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from rayos_devices.backend import Backend
from rayos_devices.loop import Loop
from rayos_devices.net.backend import NetBackend
from rayos_vmm.worker.firewall import PortFirewall

#: Seconds between two looks.
PERIOD: Final = 1.0
AT_ONCE: Final = 16


class VerdictWatch:
    """Looks at the backends' firewalls as long as the loop runs."""

    def __init__(
        self, loop: Loop, backends: Sequence[Backend], tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._loop = loop
        self._tell = tell
        self._firewalls = [
            (backend.name, backend.judge)
            for backend in backends
            if isinstance(backend, NetBackend) and isinstance(backend.judge, PortFirewall)
        ]
        if self._firewalls:
            loop.call_at(loop.now() + PERIOD, self._look)

    def _look(self) -> None:
        for name, firewall in self._firewalls:
            verdicts, more = firewall.take_events(AT_ONCE)
            if verdicts:
                self._tell({"event": "firewall", "device": name, "verdicts": verdicts, "more": more})
        self._loop.call_at(self._loop.now() + PERIOD, self._look)

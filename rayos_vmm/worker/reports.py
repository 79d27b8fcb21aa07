"""Reports of a worker to the service: refused operations, full disks, and flows that firewall rules matched.

A guest can provoke any number of each, so they are counted where they happen and told in sums: refusals at most once in
DENIALS_PERIOD; of full disks the first at once and those of the FULL_PERIOD behind it as one sum; of new flows that a
rule with `log` or `audit_only` matched VERDICTS_AT_ONCE in a VERDICTS_PERIOD, and how many more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from rayos_devices.account import DENIAL_BASE
from rayos_devices.backend import Backend
from rayos_devices.gate import Denial, Op
from rayos_devices.loop import Loop
from rayos_vmm.shared.packet import Head
from rayos_vmm.worker.firewall import PortFirewall

#: Seconds.
DENIALS_PERIOD: Final = 1.0
FULL_PERIOD: Final = 60.0
VERDICTS_PERIOD: Final = 1.0
VERDICTS_AT_ONCE: Final = 16
_DENIED: Final = DENIAL_BASE + Denial.CAPABILITY.index


class DenialWatch:
    """Looks at the backends' counters as long as the loop runs."""

    def __init__(self, loop: Loop, backends: Sequence[Backend], tell: Callable[[Head], None]) -> None:
        self._loop = loop
        self._backends = backends
        self._tell = tell
        # Behind what a predecessor counted: it has told of that.
        self._seen = [backend.stats.words[_DENIED] for backend in backends]
        self._refused = [_refused(backend) for backend in backends]
        loop.call_at(loop.now() + DENIALS_PERIOD, self._report)

    def _report(self) -> None:
        for index, backend in enumerate(self._backends):
            count = backend.stats.words[_DENIED]
            if count == self._seen[index]:
                continue
            refused = _refused(backend)
            before, self._refused[index] = self._refused[index], refused
            operations = [op.value for op in refused if refused[op] > before[op]]
            news = {"device": backend.name, "count": count - self._seen[index], "operations": operations}
            self._seen[index] = count
            self._tell({"event": "denied", "reason": Denial.CAPABILITY.value, **news})
        self._loop.call_at(self._loop.now() + DENIALS_PERIOD, self._report)


def _refused(backend: Backend) -> dict[Op, int]:
    account = backend.stats.account
    return {op: account.counted(op)[1] for op in backend.stats.ops}


def watch_fullness(loop: Loop, backends: Sequence[Backend], tell: Callable[[Head], None]) -> None:
    """Listen to the disks among the backends."""
    for backend in backends:
        backend.listen_fullness(_Disk(loop, backend, tell).ran_full)


class _Disk:
    def __init__(self, loop: Loop, disk: Backend, tell: Callable[[Head], None]) -> None:
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
        used_bytes, quota_bytes = self._disk.storage
        for why, count in self._refused.items():
            self._tell(
                {
                    "event": "disk_full",
                    "device": self._disk.name,
                    "why": why,
                    "count": count,
                    "used_bytes": used_bytes,
                    "quota_bytes": quota_bytes,
                }
            )
        self._refused.clear()
        if self._is_quiet:
            self._loop.call_at(self._loop.now() + FULL_PERIOD, self._report)


class VerdictWatch:
    """Looks at the backends' firewalls as long as the loop runs."""

    def __init__(self, loop: Loop, backends: Sequence[Backend], tell: Callable[[Head], None]) -> None:
        self._loop = loop
        self._tell = tell
        self._firewalls = [
            (backend.name, backend.judge) for backend in backends if isinstance(backend.judge, PortFirewall)
        ]
        if self._firewalls:
            loop.call_at(loop.now() + VERDICTS_PERIOD, self._report)

    def _report(self) -> None:
        for name, firewall in self._firewalls:
            verdicts, more = firewall.take_events(VERDICTS_AT_ONCE)
            if verdicts:
                self._tell({"event": "firewall", "device": name, "verdicts": verdicts, "more": more})
        self._loop.call_at(self._loop.now() + VERDICTS_PERIOD, self._report)

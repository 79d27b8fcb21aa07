"""Tells the service that a device refused operations for want of a capability: how many, at most once in PERIOD.

A guest can provoke any number of refusals, so they are counted where they happen and told in sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from rayos_devices.account import DENIAL_BASE
from rayos_devices.backend import Backend
from rayos_devices.gate import Denial, Op
from rayos_devices.loop import Loop

#: Seconds between two looks at the counters.
PERIOD: Final = 1.0
_COUNTER: Final = DENIAL_BASE + Denial.CAPABILITY.index


class DenialWatch:
    """Looks at the backends' counters as long as the loop runs."""

    def __init__(
        self, loop: Loop, backends: Sequence[Backend], tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._loop = loop
        self._backends = backends
        self._tell = tell
        # Behind what a predecessor counted: it has told of that.
        self._seen = [backend.stats.words[_COUNTER] for backend in backends]
        self._refused = [_refused(backend) for backend in backends]
        loop.call_at(loop.now() + PERIOD, self._look)

    def _look(self) -> None:
        for index, backend in enumerate(self._backends):
            count = backend.stats.words[_COUNTER]
            if count == self._seen[index]:
                continue
            refused = _refused(backend)
            before, self._refused[index] = self._refused[index], refused
            operations = [op.value for op in refused if refused[op] > before[op]]
            news = {"device": backend.name, "count": count - self._seen[index], "operations": operations}
            self._seen[index] = count
            self._tell({"event": "denied", "reason": Denial.CAPABILITY.value, **news})
        self._loop.call_at(self._loop.now() + PERIOD, self._look)


def _refused(backend: Backend) -> dict[Op, int]:
    account = backend.stats.account
    return {op: account.counted(op)[1] for op in backend.stats.ops}

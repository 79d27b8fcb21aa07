"""Tells the service that a device refused operations for want of a capability: how many, at most once in PERIOD.

A guest can provoke any number of refusals, so they are counted where they happen and told in sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from devices.backend import Backend
from devices.gate import Denial, Op
from devices.loop import Loop
from devices.stats import PAGE_BYTES

#: Seconds between two looks at the counters.
PERIOD: Final = 1.0
# The layout of a page of counters; its names are C constants once `devices.stats` is compiled.
_DENIAL_BASE: Final = PAGE_BYTES // 8 - len(Denial)
_OP_WORDS: Final = _DENIAL_BASE // len(Op)
_COUNTER: Final = _DENIAL_BASE + Denial.CAPABILITY.index


class DenialWatch:
    """Looks at the backends' counters as long as the loop runs."""

    def __init__(
        self, loop: Loop, backends: Sequence[Backend], tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._loop = loop
        self._backends = backends
        self._tell = tell
        self._seen = [0] * len(backends)
        self._refused = [dict.fromkeys(backend.stats.ops, 0) for backend in backends]
        loop.call_at(loop.now() + PERIOD, self._look)

    def _look(self) -> None:
        for index, backend in enumerate(self._backends):
            words = backend.stats.words
            count = words[_COUNTER]
            if count == self._seen[index]:
                continue
            refused = {op: words[op.index * _OP_WORDS + 1] for op in backend.stats.ops}
            before, self._refused[index] = self._refused[index], refused
            operations = [op.value for op in refused if refused[op] > before[op]]
            news = {"device": backend.name, "count": count - self._seen[index], "operations": operations}
            self._seen[index] = count
            self._tell({"event": "denied", "reason": Denial.CAPABILITY.value, **news})
        self._loop.call_at(self._loop.now() + PERIOD, self._look)

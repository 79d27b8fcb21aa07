"""Events in order: a ring of the last ones that any number of readers follow at their own pace.

Invariant: sequence numbers count up by one. A reader that fell behind the ring sees one `gap` event with
the number that it missed, never a silent hole; a slow reader costs nobody else anything.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import msgspec
import trio

RING_EVENTS: Final = 4096


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened. `seq` counts up by one; a `gap` event stands for those that were dropped.

    Types: `vm.state` {state, reason}, `vm.boot` {stage, ms}, `vm.ready` {ready_ms, guest_ms, address},
    `vm.adopted` {pid}, `vm.silent` {reason}, `vm.unrecorded` {pids}, `vm.removed`, `net.link` {up},
    `vm.qemu` {event, data} (any other QMP event), `devices.worker_exited`, `devices.worker_started` {pid, restarts},
    `devices.worker_silent` {pid, seconds},
    `dhcp.*`, `images.*`, `gap` {missed}.
    """

    seq: int
    time: float
    type: str
    vm: str | None = None
    data: dict[str, Any] = {}


class EventLog:
    """The ring. Single-threaded: publish from the trio thread alone."""

    def __init__(self, *, size: int = RING_EVENTS, clock: Callable[[], float] = time.time) -> None:
        self._ring: deque[Event] = deque(maxlen=size)
        self._next = 1
        self._clock = clock
        self._news = trio.Event()
        #: How many there were ever, by type.
        self.counts: Counter[str] = Counter()

    @property
    def last(self) -> int:
        """The newest event's sequence number; 0 before the first."""
        return self._next - 1

    def publish(self, type_: str, vm: str | None = None, **data: Any) -> Event:
        """Appends an event and wakes the readers; never waits."""
        event = Event(seq=self._next, time=self._clock(), type=type_, vm=vm, data=data)
        self._next += 1
        self.counts[type_] += 1
        self._ring.append(event)
        news, self._news = self._news, trio.Event()
        news.set()
        return event

    def after(self, since: int) -> list[Event]:
        """The events past sequence number `since`, led by a `gap` when some are gone.

        A `since` of a former daemon (beyond the newest event) starts over from the oldest kept, after a gap.
        """
        if since > self.last:
            since = 0
            if not self._ring:
                return []
            return [self._gap(self._ring[0].seq, -1), *self._ring]
        missed = self._next - 1 - since
        if missed <= 0:
            return []
        kept = [self._ring[i] for i in range(max(0, len(self._ring) - missed), len(self._ring))]
        if missed > len(kept):
            return [self._gap(kept[0].seq, missed - len(kept)), *kept]
        return kept

    def _gap(self, before: int, missed: int) -> Event:
        return Event(seq=before - 1, time=self._clock(), type="gap", data={"missed": missed})

    async def follow(self, since: int | None = None) -> AsyncGenerator[Event, None]:
        """Every event past `since` (None: from now on), without end. Cancel or `aclose` it to leave."""
        position = self.last if since is None else since
        while True:
            news = self._news
            batch = self.after(position)
            for event in batch:
                yield event
            if batch:
                position = batch[-1].seq
            else:
                if position > self.last:
                    position = 0
                await news.wait()

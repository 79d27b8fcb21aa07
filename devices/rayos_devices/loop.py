"""One thread, one epoll: the shell every backend runs in.

Descriptors wake callbacks, deadlines wake callbacks, and work that was left over (a queue with more than its
budget) is taken up again after everybody else had a turn. Raw epoll, since its wake-up costs a quarter of an
event loop's (docs/performance.md). With `set_polling` the loop looks for work for a while before it sleeps, and then
nobody has to wake it.
"""

from __future__ import annotations

import heapq
import os
import select
import time
from collections.abc import Callable
from typing import Final, Protocol

from rayos_devices.halt_polling import HaltPolling

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT


#: Looks at everything watched between two looks at the descriptors.
_LOOKS: Final = 16


class Watched(Protocol):
    """Something whose work can be seen without being told: memory that others write."""

    def poll(self) -> bool:
        """Do what there is to do; False when there was nothing, which must cost next to nothing."""
        ...

    def set_awake(self, awake: bool) -> bool:
        """Whether `poll` is called often, so that nobody needs to wake the loop; True: there is something to do."""
        ...


class Loop:
    """`run` until `stop`. Callbacks run on the loop's thread and must not block."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._cancelled: set[int] = set()
        self._sequence = 0
        self._soon: list[Callable[[], object]] = []
        self._running = False
        self._watched: tuple[Watched, ...] = ()
        self._halt_polling = HaltPolling()
        self._is_awake = False
        self._worked = 0.0
        #: Seconds spent looking in vain.
        self.polled_seconds = 0.0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.register(self._wake, self._woken)

    @staticmethod
    def now() -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def register(self, fd: int, callback: Callable[[int], None], events: int = READ) -> None:
        """Call `callback(events)` whenever `fd` is ready (level-triggered)."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Must come before the descriptor is closed. Unknown descriptors are ignored."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_at(self, when: float, callback: Callable[[], None]) -> int:
        """Call once at monotonic time `when`; returns a handle for `cancel`."""
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, callback))
        return self._sequence

    def cancel(self, handle: int) -> None:
        self._cancelled.add(handle)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call once in the next round, after every ready descriptor had its turn."""
        self._soon.append(callback)

    # -- looking instead of sleeping -----------------------------------------------------------------------------

    def set_polling(self, budget: float) -> None:
        """Look for up to `budget` seconds before sleeping, less when it is of no use; 0: never."""
        self._halt_polling = HaltPolling(budget)
        if self._is_awake and self._rest():
            self._soon.append(self._poll_once)

    def polling(self) -> dict[str, float]:
        """Returns the setting, its present value and its cost, JSON-ready."""
        polling = self._halt_polling
        return {
            "budget_us": polling.budget * 1e6,
            "window_us": polling.window * 1e6,
            "seconds": self.polled_seconds,
        }

    def watch(self, watched: Watched) -> None:
        """`poll` it as well, when the loop looks."""
        self._watched = (*self._watched, watched)

    def unwatch(self, watched: Watched) -> None:
        """Unknown ones are ignored."""
        self._watched = tuple(one for one in self._watched if one is not watched)

    def _poll(self, timeout: float | None) -> float | None:
        """Look some rounds; how long to sleep then: not at all while it may be worth looking on."""
        start = self.now()
        has_found = False
        for _ in range(_LOOKS):
            has_found |= self._poll_once()
        now = self.now()
        if has_found:
            self._worked = now
            return 0.0
        self.polled_seconds += now - start
        if now - self._worked < self._halt_polling.window:
            return 0.0
        if self._rest():
            self._rise()
            return 0.0
        return timeout

    def _poll_once(self) -> bool:
        has_found = False
        for watched in self._watched:
            has_found |= watched.poll()
        return has_found

    def _rest(self) -> bool:
        """Have everybody wake the loop from now on; True: there is something to do first."""
        self._is_awake = False
        has_work = False
        for watched in self._watched:
            has_work |= watched.set_awake(False)
        return has_work

    def _slept(self, seconds: float) -> None:
        self._halt_polling.slept(seconds)
        if self._halt_polling.window > 0.0:
            self._rise()

    def _rise(self) -> None:
        self._is_awake = True
        self._worked = self.now()
        for watched in self._watched:
            watched.set_awake(True)

    def stop(self) -> None:
        """End `run`, also from a signal handler: Python would take up an interrupted wait again."""
        self._running = False
        os.eventfd_write(self._wake, 1)

    def _woken(self, _events: int) -> None:
        os.eventfd_read(self._wake)

    def run(self) -> None:
        self._running = True
        while self._running:
            self.step()

    def step(self, timeout: float | None = None) -> None:
        """One round: wait at most `timeout` seconds (None: until something is due), then run what is ready."""
        if self._soon:
            timeout = 0.0
        elif self._timers:
            until = max(0.0, self._timers[0][0] - self.now())
            timeout = until if timeout is None else min(timeout, until)
        if self._is_awake and timeout != 0.0:
            timeout = self._poll(timeout)
        if self._halt_polling.budget and not self._is_awake and timeout != 0.0:
            start = self.now()
            ready = self._epoll.poll(timeout)
            self._slept(self.now() - start)
        else:
            ready = self._epoll.poll(timeout)
            if ready and self._is_awake:
                self._worked = self.now()
        for fd, events in ready:
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback(events)
        if self._timers:
            now = self.now()
            while self._timers and self._timers[0][0] <= now:
                _, handle, due = heapq.heappop(self._timers)
                if handle in self._cancelled:
                    self._cancelled.discard(handle)
                else:
                    due()
        if self._soon:
            batch, self._soon = self._soon, []
            for work in batch:
                work()

    def close(self) -> None:
        self._epoll.close()
        self._callbacks.clear()
        os.close(self._wake)

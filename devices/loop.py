"""One thread, one epoll: the shell every backend runs in.

Descriptors wake callbacks, deadlines wake callbacks, and work that was left over (a queue with more than its
budget) is taken up again after everybody else had a turn. Raw epoll, since its wake-up costs a quarter of an
event loop's (docs/performance.md).
"""

from __future__ import annotations

import heapq
import os
import select
import time
from collections.abc import Callable
from typing import Final

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT


class Loop:
    """`run` until `stop`. Callbacks run on the loop's thread and must not block."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._cancelled: set[int] = set()
        self._sequence = 0
        self._soon: list[Callable[[], None]] = []
        self._running = False
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
        for fd, events in self._epoll.poll(timeout):
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

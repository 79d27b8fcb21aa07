"""How fast replies may follow one another: a client's receive buffer is small, and what it drops comes again late.

Invariant: no more than `BURST` replies in `BURST_SECONDS`, or twice that after a rest.
"""

from typing import Final

BURST: Final = 32  # replies; a longer burst overflows receive buffers of the usual size
BURST_SECONDS: Final = 0.001


class Pace:
    """Counts replies; `pause` says how long to wait before the next one. `now` is in seconds."""

    def __init__(self) -> None:
        self._count = 0
        self._began = 0.0

    def pause(self, replies: int, now: float) -> float:
        """`replies` more went out until now: the seconds until the next one may."""
        self._count += replies
        if self._count < BURST:
            return 0.0
        due = self._began + self._count / BURST * BURST_SECONDS
        self._count, self._began = 0, max(due, now)
        return self._began - now

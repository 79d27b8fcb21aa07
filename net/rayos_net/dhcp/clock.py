"""Seconds since the epoch that never go back: the wall clock once, then the boot clock, which counts
suspended time too.
"""

import time


class Clock:
    """A clock set from the wall clock when it is made and not disturbed by later changes of that."""

    def __init__(self) -> None:
        self._offset = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def now(self) -> float:
        """The time in seconds since the epoch."""
        return self._offset + time.clock_gettime(time.CLOCK_BOOTTIME)

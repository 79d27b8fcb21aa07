"""A token bucket that shapes: it says how long to wait, and never forgets a fraction of a byte.

Cost is paid after the fact (a bucket may go into debt by one operation), so an operation larger than the burst is
delayed rather than blocked for ever, and the long-run rate is exact.
"""

from __future__ import annotations


class TokenBucket:
    """`rate` units a second, at most `burst` units at once. Time is the caller's, in seconds, never backwards."""

    def __init__(self, rate: float, burst: float, *, now: float) -> None:
        if rate <= 0 or burst <= 0:
            raise ValueError(f"rate {rate} and burst {burst} must both be above 0")
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._stamp = now

    def wait(self, now: float) -> float:
        """Seconds until the next operation may start; 0.0 when it may now."""
        if now > self._stamp:
            self._level += (now - self._stamp) * self.rate
            if self._level > self.burst:
                self._level = self.burst
            self._stamp = now
        # Less than a microsecond is float dust (at 10^6 seconds and 1 Gbit/s even the clock's last digit is more than a
        # byte): without the slack a timer could fire a hair early for ever. The debt stays, so no rate is lost.
        return 0.0 if self._level > -1e-6 * self.rate else -self._level / self.rate

    def take(self, units: float) -> None:
        """Pay for an operation that was done."""
        self._level -= units

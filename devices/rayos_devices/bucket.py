"""A token bucket that shapes: it says how long to wait, and never forgets a fraction of a byte.

Cost is paid after the fact (a bucket may go into debt by one operation), so an operation larger than the burst is
delayed rather than blocked for ever, and the long-run rate is exact.
"""

from __future__ import annotations

from typing import Final

#: Seconds of work that may be done at once after a pause: more than a timer comes late.
BURST_SECONDS: Final = 0.01


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

    def set_rate(self, rate: float, burst: float, *, now: float) -> None:
        """Go on at another rate: what was earned until `now` stays earned, as far as the new burst holds it."""
        if rate <= 0 or burst <= 0:
            raise ValueError(f"rate {rate} and burst {burst} must both be above 0")
        self.wait(now)
        self.rate = rate
        self.burst = burst
        self._level = min(self._level, burst)


class Limiter:
    """Operations and bytes a second of a whole device, and how many at once, however many queues it has; 0 is
    unbounded."""

    def __init__(self) -> None:
        self.is_on = False
        self.operations_per_second = 0.0
        self.bytes_per_second = 0.0
        self.at_once = 0
        #: Operations on their way.
        self.busy = 0
        #: How often a queue had to wait.
        self.waits = 0
        self._operations = TokenBucket(1.0, 1.0, now=0.0)
        self._bytes = TokenBucket(1.0, 1.0, now=0.0)

    def set(self, operations_per_second: float, bytes_per_second: float, *, now: float) -> None:
        """Change the limits at once. Errors: ValueError for a negative one."""
        if operations_per_second < 0 or bytes_per_second < 0:
            raise ValueError(
                f"limits of {operations_per_second} and {bytes_per_second}: at least 0 is allowed"
            )
        self._operations = _changed(self._operations, self.operations_per_second, operations_per_second, now)
        self._bytes = _changed(self._bytes, self.bytes_per_second, bytes_per_second, now)
        self.operations_per_second = operations_per_second
        self.bytes_per_second = bytes_per_second
        self._turn_on()

    def set_at_once(self, count: int) -> None:
        """Change how many operations may be on their way; those that are stay."""
        self.at_once = count
        self._turn_on()

    def _turn_on(self) -> None:
        self.is_on = self.operations_per_second > 0 or self.bytes_per_second > 0 or self.at_once > 0

    def is_full(self) -> bool:
        """As many are on their way as may be."""
        return 0 < self.at_once <= self.busy

    def wait(self, now: float) -> float:
        """Seconds until the next operation may start."""
        seconds = 0.0
        if self.operations_per_second > 0:
            seconds = self._operations.wait(now)
        if self.bytes_per_second > 0:
            seconds = max(seconds, self._bytes.wait(now))
        return seconds

    def take(self, size: float) -> None:
        """Pay for one operation of `size` bytes."""
        if self.operations_per_second > 0:
            self._operations.take(1.0)
        if self.bytes_per_second > 0:
            self._bytes.take(size)


def lower(one: float, other: float) -> float:
    """The lower of two rates; 0 is unbounded."""
    return min(one or other, other or one)


def _changed(bucket: TokenBucket, old: float, new: float, now: float) -> TokenBucket:
    burst = max(new * BURST_SECONDS, 1.0)
    if old > 0 and new > 0:
        bucket.set_rate(new, burst, now=now)
        return bucket
    return TokenBucket(new or 1.0, burst, now=now)

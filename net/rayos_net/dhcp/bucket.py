"""Token buckets, one per port, in bounded memory.

Invariant: a port gets at most `burst` at once and `rate_per_second` in the long run; a full bucket is
forgotten, since a new one is equal to it.
"""

from typing import Final

_PORTS_MAX: Final = 4096  # beyond, full buckets are dropped; a link has far fewer ports


class Buckets:
    """A token bucket for each port name. A rate of None lets everything through."""

    def __init__(self, rate_per_second: float | None, burst: int) -> None:
        self._rate = rate_per_second
        self._burst = float(burst)
        self._level: dict[str, tuple[float, float]] = {}  # port: tokens, when counted

    def take(self, port: str, now: float) -> float:
        """Take one token and return 0; when there is none, return the seconds until there will be one."""
        rate = self._rate
        if rate is None:
            return 0.0
        tokens, at = self._level.get(port, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * rate)
        if len(self._level) >= _PORTS_MAX:
            self._forget_full(now, rate)
        if tokens < 1.0:
            self._level[port] = (tokens, now)
            return (1.0 - tokens) / rate
        self._level[port] = (tokens - 1.0, now)
        return 0.0

    def _forget_full(self, now: float, rate: float) -> None:
        kept = {
            port: (tokens, at)
            for port, (tokens, at) in self._level.items()
            if tokens + (now - at) * rate < self._burst
        }
        self._level = kept if len(kept) < _PORTS_MAX else {}

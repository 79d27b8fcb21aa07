"""Decides when a measured imbalance of the device workers is worth a move, without being asked. Sans-IO.

It acts once the busiest core is START above the idlest at LOOKS looks in a row, and goes on until they are within
STOP: a load between the two neither begins nor ends anything. One worker at a time, PAUSE seconds apart, at most
PER_MINUTE a minute; which one and where, and that it rests afterwards, is the balancer's business.
"""

from __future__ import annotations

from typing import Any, Final

from rayos_vmm.service.balance import Balancer, Move

#: Parts of one core.
START: Final = 0.3
STOP: Final = 0.15
LOOKS: Final = 3
#: Seconds.
PAUSE: Final = 5.0
PER_MINUTE: Final = 6
_MINUTE: Final = 60.0


class Automatic:
    """`look` after each measurement. `held_back` counts looks at which a move had to wait for its time."""

    def __init__(self, balancer: Balancer, *, is_on: bool = False) -> None:
        self.is_on = is_on
        self.moves = 0
        self.held_back = 0
        self._balancer = balancer
        self._looks = 0
        self._tried: list[float] = []

    def look(self, *, now: float) -> Move | None:
        """The move to make now. It counts as tried, whatever comes of it; `moved` when it was made."""
        bound = STOP if self._looks >= LOOKS else START
        is_uneven = self.is_on and self._balancer.imbalance >= bound
        self._looks = self._looks + 1 if is_uneven else 0
        if self._looks < LOOKS:
            return None
        plan = self._balancer.plan(now=now)
        if not plan:
            return None
        self._tried = [when for when in self._tried if now - when < _MINUTE]
        if len(self._tried) >= PER_MINUTE or (self._tried and now - self._tried[-1] < PAUSE):
            self.held_back += 1
            return None
        self._tried.append(now)
        return plan[0]

    def moved(self, move: Move, *, now: float) -> None:
        """A move that `look` gave was made."""
        self.moves += 1
        self._balancer.moved(move, now=now)

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "on": self.is_on,
            "acting": self._looks >= LOOKS,
            "moves": self.moves,
            "held_back": self.held_back,
        }

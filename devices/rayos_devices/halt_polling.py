"""How long to look for work before sleeping: the rule of KVM's halt polling (Documentation/virt/kvm/halt-polling.rst).

A sleep that ended within the budget would have been worth looking through, so the next look is longer; one that lasted
longer was not, so it is shorter, down to none. A device that nobody uses costs nothing.
"""

from __future__ import annotations

from typing import Final

#: The first look is this part of the budget.
_START: Final = 8


class HaltPolling:
    """`window` is how long to look now, in seconds, never above `budget`."""

    def __init__(self, budget: float = 0.0) -> None:
        if budget < 0.0:
            raise ValueError(f"a polling budget of {budget} s: 0 (never) or more is allowed")
        self.budget = budget
        self.window = 0.0

    def slept(self, seconds: float) -> None:
        """A sleep ended after `seconds`."""
        if seconds <= self.budget:
            self.window = min(self.budget, max(2.0 * self.window, self.budget / _START))
        elif self.window >= 2.0 * self.budget / _START:
            self.window /= 2.0
        else:
            self.window = 0.0

"""Faults on purpose, for those who test what their system does about them: errors, losses, delays, full queues.

Theory of operation: a device that has faults asks `decide` before each operation; the first rule that matches and is
due answers. Rules are tried in their order, count what they match and what they did, and draw from one seeded
generator: the same operations meet the same faults again. A device without faults asks nothing and pays nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

#: What can be made of each operation. Discard and write-zeroes are left alone.
ACTIONS: Final[Mapping[str, frozenset[str]]] = {
    "read": frozenset({"error", "delay"}),
    "write": frozenset({"error", "delay"}),
    "flush": frozenset({"error", "delay"}),
    "tx": frozenset({"drop", "delay"}),
    "rx": frozenset({"drop", "full"}),
}
MAX_RULES: Final = 64
MAX_DELAY_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One rule: when it is met, `action` happens to `op`.

    op, action: a pair of ACTIONS. error: the guest gets an I/O error; drop: the frame is lost on the wire; full: it is
    lost as if the guest had no buffer; delay: it takes `delay_s` seconds more, and on a disk so does all behind it.
    sector, sectors: only requests that touch these (512 bytes each); None: all.
    nth: only the nth that matches. every: each so many. probability: of those that are left. count: at most so many
    times, 0 without bound.

    Errors: ValueError says which field, what was seen and what is allowed.
    """

    op: str
    action: str
    sector: int | None = None
    sectors: int = 1
    nth: int = 0
    every: int = 0
    probability: float = 1.0
    count: int = 0
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.op not in ACTIONS:
            raise ValueError(f"op {self.op!r}; allowed are {', '.join(ACTIONS)}")
        if self.action not in ACTIONS[self.op]:
            allowed = ", ".join(sorted(ACTIONS[self.op]))
            raise ValueError(f"action {self.action!r} of {self.op}; allowed are {allowed}")
        if self.sector is not None and self.op not in ("read", "write"):
            raise ValueError(f"a sector with {self.op}; only read and write have one")
        for name in ("nth", "every", "count"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}; 0 and more are allowed")
        if (self.sector is not None and self.sector < 0) or self.sectors < 1:
            raise ValueError(f"{self.sectors} sectors at {self.sector}; allowed are 1 and more, from 0 on")
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability {self.probability}; above 0 and up to 1 is allowed")
        if (self.action == "delay") is not (0 < self.delay_s <= MAX_DELAY_S):
            raise ValueError(
                f"delay {self.delay_s} s with action {self.action}; "
                f"delay has above 0 and up to {MAX_DELAY_S:g} s, the others 0"
            )

    def matches(self, op: str, sector: int, sectors: int) -> bool:
        """Whether an operation is one that it is about."""
        if op != self.op:
            return False
        return self.sector is None or (sector < self.sector + self.sectors and self.sector < sector + sectors)


class Faults:
    """The rules of one device, and what they did.

    Errors: ValueError for more than MAX_RULES.
    """

    def __init__(self, rules: Sequence[Fault], *, seed: int = 0) -> None:
        if len(rules) > MAX_RULES:
            raise ValueError(f"{len(rules)} faults; at most {MAX_RULES} are allowed")
        self.rules = tuple(rules)
        self.seed = seed
        self.matched = [0] * len(rules)
        self.done = [0] * len(rules)
        self._random = random.Random(seed)

    def decide(self, op: str, sector: int = 0, sectors: int = 0) -> Fault | None:
        """Returns the fault that strikes this operation, or None."""
        for index, rule in enumerate(self.rules):
            if not rule.matches(op, sector, sectors):
                continue
            self.matched[index] += 1
            if self._is_due(rule, self.matched[index], self.done[index]):
                self.done[index] += 1
                return rule
        return None

    def _is_due(self, rule: Fault, matched: int, done: int) -> bool:
        if rule.count and done >= rule.count:
            return False
        if rule.nth and matched != rule.nth:
            return False
        if rule.every and matched % rule.every:
            return False
        return rule.probability == 1 or self._random.random() < rule.probability

    def snapshot(self) -> list[dict[str, Any]]:
        """Each rule with `matched` and `done`, JSON-ready."""
        names = [field.name for field in fields(Fault)]
        return [
            {**{name: getattr(rule, name) for name in names}, "matched": matched, "done": done}
            for rule, matched, done in zip(self.rules, self.matched, self.done, strict=True)
        ]


def plan_faults(current: Faults | None, fields: dict[str, Any]) -> Faults | None:
    """The faults of a device after a request of the host's: new ones if it has `rules`, none if those are empty."""
    if "rules" not in fields:
        return current
    rules = [Fault(**rule) for rule in fields["rules"]]
    return Faults(rules, seed=int(fields["seed"])) if rules else None

"""A grant: rights that a machine holds, from where, and until when.

Three kinds form trees. BASE is what the machine was defined with, GRANT what an operator gave it: these are roots.
A DELEGATION has a parent, held by another machine. A grant ends at the earliest of two clocks: the wall's, and the
steady one of this boot, so setting the wall clock back prolongs nothing. A reboot ends what has an end, for the
steady clock starts over.

Invariant of the trees (`table.Table` keeps it): along every edge the child's rights and constraints are within the
parent's, its end is not later, and it is one hop further; at most MAX_HOPS from the root.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec

from rayos_vmm.policy.capability import Capability, names
from rayos_vmm.policy.constraint import NO_CONSTRAINTS, Constraints
from rayos_vmm.policy.view import GrantView

#: Longest life of a grant with an end, seconds: a year.
TTL_MAXIMUM: Final = 366 * 86400.0
MAX_HOPS: Final = 3


class Kind(StrEnum):
    """How a right came about."""

    BASE = "base"
    GRANT = "grant"
    DELEGATION = "delegation"


class Moment(msgspec.Struct, frozen=True):
    """Now, by every clock: seconds since the epoch, seconds since `boot` began (CLOCK_BOOTTIME)."""

    wall: float
    steady: float
    boot: str


class End(msgspec.Struct, frozen=True):
    """When a grant is over: at the earliest of the two."""

    wall: float
    steady: float
    boot: str

    @classmethod
    def after(cls, ttl_s: float, now: Moment) -> End:
        return cls(now.wall + ttl_s, now.steady + ttl_s, now.boot)

    def has_come(self, now: Moment) -> bool:
        return now.boot != self.boot or now.wall >= self.wall or now.steady >= self.steady

    def left(self, now: Moment) -> float:
        """Seconds until then, 0 when it has come."""
        if self.has_come(now):
            return 0.0
        return min(self.wall - now.wall, self.steady - now.steady)


def earliest(one: End | None, other: End | None) -> End | None:
    """The end that is not after either; None is never."""
    if one is None or other is None:
        return one or other
    return End(min(one.wall, other.wall), min(one.steady, other.steady), one.boot)


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """`holder` has `rights` until `end` (None: until they are taken away)."""

    id: int
    kind: Kind
    holder: str
    rights: int
    reason: str = ""
    end: End | None = None
    parent: int | None = None
    hops: int = 0
    constraints: Constraints = NO_CONSTRAINTS

    @property
    def capabilities(self) -> Capability:
        return Capability(self.rights)

    def view(self, now: Moment) -> GrantView:
        """For callers."""
        return GrantView(
            id=self.id,
            kind=self.kind.value,
            vm=self.holder,
            capabilities=names(self.capabilities),
            reason=self.reason,
            expires=self.end.wall if self.end else None,
            left_s=round(self.end.left(now), 3) if self.end else None,
            parent=self.parent,
            hops=self.hops,
            constraints=self.constraints,
        )


def chain(grants: Mapping[int, Grant], grant: Grant) -> list[Grant]:
    """From the root down to `grant`."""
    found = [grant]
    while found[-1].parent is not None:
        found.append(grants[found[-1].parent])
    return found[::-1]


def children(grants: Mapping[int, Grant], grant_id: int) -> list[Grant]:
    return [grant for grant in grants.values() if grant.parent == grant_id]


def subtree(grants: Mapping[int, Grant], grant_id: int) -> list[Grant]:
    """`grant_id` and all that was passed on from it, parents first."""
    found = [grants[grant_id]]
    for grant in found:
        found += children(grants, grant.id)
    return found


def best_source(
    grants: Mapping[int, Grant],
    holder: str,
    to: str,
    rights: Capability,
    constraints: Constraints = NO_CONSTRAINTS,
) -> Grant | None:
    """The grant of `holder` that can pass all of `rights` on to `to`, as far as `constraints` ask: the longest-lived,
    then the nearest its root.
    """
    candidates = [
        grant
        for grant in grants.values()
        if grant.holder == holder
        and rights in grant.capabilities
        and grant.hops < MAX_HOPS
        and constraints.under(grant.constraints).is_within(grant.constraints)
        and to not in {link.holder for link in chain(grants, grant)}
    ]

    def merit(grant: Grant) -> tuple[float, int, int]:
        return (-(grant.end.steady if grant.end else float("inf")), grant.hops, grant.id)

    return min(candidates, key=merit, default=None)

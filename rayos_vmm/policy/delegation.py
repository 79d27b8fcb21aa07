"""Delegations as trees: who passed a right on, and what goes when it goes.

Invariant (`table.Table` keeps it): along every edge the child's rights and constraints are within the parent's, its
end is not later, and it is one hop further; at most MAX_HOPS from the root.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rayos_vmm.policy.capability import Capability
from rayos_vmm.policy.constraint import NO_CONSTRAINTS, Constraints
from rayos_vmm.policy.grant import Grant

MAX_HOPS: Final = 3


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

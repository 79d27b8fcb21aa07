"""Every grant there is, and the only ways in which it changes: define, grant, delegate, revoke, expire, forget.

Invariant: no step gives a machine a right that neither its definition nor an operator's grant holds at this moment,
in the machine itself or down a chain of delegations. `now` is an argument; expired grants are dropped by `expire`,
which every other step calls first, so a clock that is set back finds nothing to revive.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from rayos_vmm.policy.capability import NONE, Capability, names
from rayos_vmm.policy.constraint import CONSTRAINTS_MAXIMUM, NO_CONSTRAINTS, Bounds, Constraints, bounds
from rayos_vmm.policy.grant import (
    MAX_HOPS,
    TTL_MAXIMUM,
    End,
    Grant,
    Kind,
    Moment,
    best_source,
    earliest,
    subtree,
)
from rayos_vmm.policy.view import Usage

MAX_GRANTS: Final = 256
MAX_DELEGATIONS: Final = 128


class Denied(Exception):
    """The policy does not allow the change; the text says why."""


class Unknown(Denied):
    """There is no such machine or grant."""


class Saved(msgspec.Struct, frozen=True):
    """A table as it is stored."""

    next_id: int
    grants: list[Grant]


class Table:
    """The grants by number. Numbers are never used again."""

    def __init__(self, saved: Saved | None = None) -> None:
        self._next = saved.next_id if saved else 1
        self.grants: dict[int, Grant] = {grant.id: grant for grant in saved.grants} if saved else {}

    def copy(self) -> Table:
        """Another table with the same content: grants are values."""
        return Table(self.save())

    def save(self) -> Saved:
        return Saved(self._next, list(self.grants.values()))

    # -- what is -------------------------------------------------------------------------------------------------

    def holds(self, vm: str) -> Capability:
        """All that a machine may do, as of the last `expire`."""
        rights = NONE
        for grant in self.grants.values():
            if grant.holder == vm:
                rights |= grant.capabilities
        return rights

    def bounds(self, vm: str) -> Bounds:
        """Returns the sum of the constraints of a machine's grants."""
        return bounds(
            (grant.capabilities, grant.constraints) for grant in self.grants.values() if grant.holder == vm
        )

    def usage(self) -> dict[str, Usage]:
        """How many there are of what has a limit, and the limit."""
        kinds = [grant.kind for grant in self.grants.values()]
        constraints = sum(grant.constraints.count for grant in self.grants.values())
        return {
            "grants": Usage(used=kinds.count(Kind.GRANT), limit=MAX_GRANTS),
            "delegations": Usage(used=kinds.count(Kind.DELEGATION), limit=MAX_DELEGATIONS),
            "constraints": Usage(used=constraints, limit=CONSTRAINTS_MAXIMUM),
        }

    def is_known(self, vm: str) -> bool:
        return any(grant.kind is Kind.BASE and grant.holder == vm for grant in self.grants.values())

    def next_end(self, now: Moment) -> float | None:
        """Seconds until the next grant is over; None when none has an end."""
        return min((grant.end.left(now) for grant in self.grants.values() if grant.end), default=None)

    # -- what changes --------------------------------------------------------------------------------------------

    def define(self, vm: str, rights: Capability) -> Grant:
        """A machine comes into being with its own rights."""
        if self.is_known(vm):
            raise Denied(f"{vm} is known already")
        return self._add(Kind.BASE, vm, rights, "as defined", None)

    def grant(
        self,
        vm: str,
        rights: Capability,
        ttl_s: float | None,
        reason: str,
        now: Moment,
        constraints: Constraints = NO_CONSTRAINTS,
    ) -> Grant:
        """An operator's grant, for `ttl_s` seconds or until it is revoked.

        Raises:
            Unknown: there is no such machine.
            Denied: there are too many, or the time is out of bounds, or the constraints make no sense.
        """
        self.expire(now)
        self._check(vm, rights)
        self._check_room(Kind.GRANT, MAX_GRANTS)
        self._check_constraints(rights, constraints)
        return self._add(Kind.GRANT, vm, rights, reason, _end(ttl_s, now), constraints=constraints)

    def delegate(
        self,
        source: str,
        to: str,
        rights: Capability,
        ttl_s: float | None,
        now: Moment,
        constraints: Constraints = NO_CONSTRAINTS,
    ) -> Grant:
        """A machine passes on what it holds; the new grant lives no longer, and may no more, than that it comes from.

        Raises:
            Unknown: there is no such machine.
            Denied: `source` has no one grant with all of it, or the chain would be too long or a circle.
        """
        self.expire(now)
        self._check(source, rights)
        self._check(to, rights)
        if source == to:
            raise Denied(f"{source} cannot delegate to itself")
        self._check_room(Kind.DELEGATION, MAX_DELEGATIONS)
        end = _end(ttl_s, now)
        self._check_constraints(rights, constraints)
        parent = best_source(self.grants, source, to, rights, constraints)
        if parent is None:
            within = " within these constraints" if constraints.count else ""
            raise Denied(
                f"{source} has no grant with {'+'.join(names(rights))}{within} that can go on to {to}: a chain has at "
                f"most {MAX_HOPS} hops and no machine twice"
            )
        constraints = constraints.under(parent.constraints).of(rights)
        self._check_constraints(rights, constraints)
        reason = f"from {source}"
        return self._add(
            Kind.DELEGATION,
            to,
            rights,
            reason,
            earliest(end, parent.end),
            parent.id,
            parent.hops + 1,
            constraints=constraints,
        )

    def revoke(self, grant_id: int, now: Moment) -> list[Grant]:
        """Ends a grant and all that was passed on from it; returns these. A machine's base is emptied instead.

        Raises:
            Unknown: there is none of that number (any more).
        """
        self.expire(now)
        if grant_id not in self.grants:
            raise Unknown(f"there is no grant {grant_id}")
        return self._take(grant_id, Capability(self.grants[grant_id].rights))

    def revoke_rights(self, vm: str, rights: Capability, now: Moment) -> list[Grant]:
        """Takes rights from a machine, wherever it has them from, and from all that it passed them on to.

        Returns the grants as they were that lost something.

        Raises:
            Unknown: there is no such machine.
        """
        self.expire(now)
        self._check(vm, rights)
        changed: list[Grant] = []
        for grant in list(self.grants.values()):
            if grant.holder == vm and grant.id in self.grants and grant.rights & rights:
                changed += self._take(grant.id, rights)
        return changed

    def expire(self, now: Moment) -> list[Grant]:
        """Drops what is over, with what was passed on from it; returns these."""
        over = [grant for grant in self.grants.values() if grant.end and grant.end.has_come(now)]
        return [gone for grant in over if grant.id in self.grants for gone in self.drop(grant.id)]

    def forget(self, vm: str) -> list[Grant]:
        """A machine is no more: its grants go, and what it passed on."""
        own = [grant.id for grant in self.grants.values() if grant.holder == vm]
        return [gone for grant_id in own if grant_id in self.grants for gone in self.drop(grant_id)]

    # -- inner workings ------------------------------------------------------------------------------------------

    def _check(self, vm: str, rights: Capability) -> None:
        if not self.is_known(vm):
            raise Unknown(f"there is no machine {vm!r}")
        if not rights:
            raise Denied("no capability was named")

    def _check_room(self, kind: Kind, limit: int) -> None:
        count = sum(grant.kind is kind for grant in self.grants.values())
        if count >= limit:
            raise Denied(f"there are {count} {kind.value}s; at most {limit} are allowed")

    def _check_constraints(self, rights: Capability, constraints: Constraints) -> None:
        if problem := constraints.problem(rights):
            raise Denied(problem)
        count = sum(grant.constraints.count for grant in self.grants.values())
        if constraints.count and count + constraints.count > CONSTRAINTS_MAXIMUM:
            raise Denied(f"there are {count} constraints; at most {CONSTRAINTS_MAXIMUM} are allowed")

    def _add(
        self,
        kind: Kind,
        vm: str,
        rights: Capability,
        reason: str,
        end: End | None,
        parent: int | None = None,
        hops: int = 0,
        constraints: Constraints = NO_CONSTRAINTS,
    ) -> Grant:
        grant = Grant(
            id=self._next,
            kind=kind,
            holder=vm,
            rights=int(rights),
            reason=reason,
            end=end,
            parent=parent,
            hops=hops,
            constraints=constraints,
        )
        self._next += 1
        self.grants[grant.id] = grant
        return grant

    def drop(self, grant_id: int) -> list[Grant]:
        """Takes a grant out with all that was passed on from it; returns these."""
        gone = subtree(self.grants, grant_id)
        for grant in gone:
            del self.grants[grant.id]
        return gone

    def _take(self, grant_id: int, rights: Capability) -> list[Grant]:
        """Removes rights from a whole subtree; what is left without any goes, but for a machine's base."""
        before = [grant for grant in subtree(self.grants, grant_id) if grant.rights & rights]
        for grant in before:
            rest = grant.rights & ~int(rights)
            if rest or grant.kind is Kind.BASE:
                self.grants[grant.id] = msgspec.structs.replace(grant, rights=rest)
            else:
                del self.grants[grant.id]
        return before


def _end(ttl_s: float | None, now: Moment) -> End | None:
    if ttl_s is None:
        return None
    if not 0 < ttl_s <= TTL_MAXIMUM:
        raise Denied(f"a time of {ttl_s:g} s: more than 0 and at most {TTL_MAXIMUM:g} s are allowed")
    return End.after(ttl_s, now)


def holders(grants: Iterable[Grant]) -> set[str]:
    """The machines that these grants belong to."""
    return {grant.holder for grant in grants}

"""Constraints of a grant: what the rights may be used for, beyond having them.

Ports limit CAP_NET: TCP and UDP to and from these alone, ICMP, and no protocol that has no ports. A bandwidth shapes
the network card (each direction) and the disks of the machine; a concurrency is how many requests each disk works on at
once (the only device that works on several); an audit requirement has each second of use recorded.
A delegation's constraints are within those that it comes from. Of several grants of the same right the widest counts,
as each is enough by itself; only an audit requirement of one is a requirement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from rayos_vmm.config.firewall import FirewallRule, OwnedRule
from rayos_vmm.policy.capability import OPERATIONS, Capability

CONSTRAINTS_MAXIMUM: Final = 512
RANGES_MAXIMUM: Final = 16
PORT_MAXIMUM: Final = 65535
CONCURRENT_MAXIMUM: Final = 1 << 16
#: Slower than this a card or disk only looks broken.
BANDWIDTH_MINIMUM: Final = 8000  # bits a second
_DISK: Final = Capability.CAP_DISK_R | Capability.CAP_DISK_W
Range = tuple[int, int]


class Constraints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Inclusive port ranges (none: every port), bits a second, disk requests at once (None: no limit), and whether use
    is recorded."""

    ports: tuple[Range, ...] = ()
    bandwidth: int | None = None
    concurrent: int | None = None
    audit: bool = False

    @property
    def count(self) -> int:
        """How many of CONSTRAINTS_MAXIMUM these are."""
        limits = (self.bandwidth, self.concurrent)
        return bool(self.ports) + sum(one is not None for one in limits) + self.audit

    def problem(self, rights: Capability) -> str:
        """Why they make no sense with these rights; empty when they do."""
        if self.ports and Capability.CAP_NET not in rights:
            return "ports limit CAP_NET, and that is not among the rights"
        if self.bandwidth is not None and not rights & (_DISK | Capability.CAP_NET):
            return "a bandwidth limits CAP_NET and CAP_DISK_*, and none of these is among the rights"
        if self.bandwidth is not None and self.bandwidth < BANDWIDTH_MINIMUM:
            return f"a bandwidth of {self.bandwidth} bit/s; at least {BANDWIDTH_MINIMUM} are needed"
        if self.concurrent is not None and not rights & _DISK:
            return "operations at once are limited with CAP_DISK_*: no other device works on more than one"
        if self.concurrent is not None and not 1 <= self.concurrent <= CONCURRENT_MAXIMUM:
            return f"{self.concurrent} operations at once; 1 to {CONCURRENT_MAXIMUM} are allowed"
        if len(self.ports) > RANGES_MAXIMUM:
            return f"{len(self.ports)} port ranges; at most {RANGES_MAXIMUM} are allowed"
        for first, last in self.ports:
            if not 0 <= first <= last <= PORT_MAXIMUM:
                return f"ports {first}-{last}: no range in 0..{PORT_MAXIMUM}"
        return ""

    def is_within(self, other: Constraints) -> bool:
        """Whether these allow nothing that `other` does not."""
        ports = _merged(other.ports)
        own = _merged(self.ports)
        is_inside = all(any(a <= first and last <= b for a, b in ports) for first, last in own)
        is_narrow = not ports or (bool(own) and is_inside)
        return (
            is_narrow
            and _is_lower(self.bandwidth, other.bandwidth)
            and _is_lower(self.concurrent, other.concurrent)
            and (self.audit or not other.audit)
        )

    def of(self, rights: Capability) -> Constraints:
        """Those of them that concern these rights."""
        has_rate = bool(rights & (_DISK | Capability.CAP_NET))
        return Constraints(
            ports=self.ports if Capability.CAP_NET in rights else (),
            bandwidth=self.bandwidth if has_rate else None,
            concurrent=self.concurrent if rights & _DISK else None,
            audit=self.audit,
        )

    def under(self, parent: Constraints) -> Constraints:
        """These for a delegation of `parent`: what is left open is the parent's."""
        return Constraints(
            ports=self.ports or parent.ports,
            bandwidth=parent.bandwidth if self.bandwidth is None else self.bandwidth,
            concurrent=parent.concurrent if self.concurrent is None else self.concurrent,
            audit=self.audit or parent.audit,
        )


NO_CONSTRAINTS: Final = Constraints()


class Bounds(msgspec.Struct, frozen=True):
    """The sum of all grants of one machine: ports, rates (bits a second), disk requests at once, recorded uses."""

    ports: tuple[Range, ...] = ()
    net: int | None = None
    disk: int | None = None
    at_once: int | None = None
    audited: int = 0


NO_BOUNDS: Final = Bounds()


def bounds(held: Iterable[tuple[Capability, Constraints]]) -> Bounds:
    """Of the rights and constraints of every grant that a machine holds."""
    grants = list(held)
    net = [limits for rights, limits in grants if Capability.CAP_NET in rights]
    disk = [limits for rights, limits in grants if rights & _DISK]
    ports = [limits.ports for limits in net]
    audited = 0
    for capability, operations in OPERATIONS.items():
        if any(limits.audit and capability in rights for rights, limits in grants):
            for operation in operations:
                audited |= 1 << operation.index
    return Bounds(
        _merged([one for some in ports for one in some]) if all(ports) else (),
        _widest([limits.bandwidth for limits in net]),
        _widest([limits.bandwidth for limits in disk]),
        _widest([limits.concurrent for limits in disk]),
        audited,
    )


def _is_lower(limit: int | None, other: int | None) -> bool:
    return other is None or (limit is not None and limit <= other)


def _widest(limits: Sequence[int | None]) -> int | None:
    return None if None in limits or not limits else max(limit for limit in limits if limit is not None)


def _merged(ranges: Sequence[Range]) -> tuple[Range, ...]:
    found: list[Range] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)


def port_rules(ports: Sequence[Range], origin: str) -> list[OwnedRule]:
    """Firewall rules, before all others, that refuse what is not to one of these ports; none for every port."""
    if not ports:
        return []
    edges = [-1, *(edge for one in _merged(ports) for edge in one), PORT_MAXIMUM + 1]
    between = [(edges[at] + 1, edges[at + 1] - 1) for at in range(0, len(edges), 2)]
    rest: list[int | str] = [f"{first}-{last}" for first, last in between if first <= last]
    rules = [
        FirewallRule(name=f"other-{protocol}-ports", action="deny", protocol=protocol, ports=rest, priority=0)
        for protocol in ("tcp", "udp")
        if rest
    ]
    rules.append(FirewallRule(name="no-ports", action="deny", protocol="portless", priority=0))
    return [OwnedRule(origin, rule) for rule in rules]

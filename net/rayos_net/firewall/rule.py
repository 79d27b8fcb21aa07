"""Firewall rules as values, and their words.

Invariant: a Rule is complete and consistent once made (ports only where the protocol has some, addresses of
one family), so the compiler needs no checks. Rules are looked at in the order of `priority`, lowest first,
then as they stand in the list; the first that matches decides, but one that is `audit_only` is only counted
and logged.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

from rayos_net.packet import ICMP, ICMPV6, TCP, UDP

Network = IPv4Network | IPv6Network

PROTOCOLS: Final[Mapping[str, int]] = {
    "icmp": ICMP,
    "tcp": TCP,
    "udp": UDP,
    "gre": 47,
    "esp": 50,
    "icmpv6": ICMPV6,
    "sctp": 132,
    "portless": -1,
}
#: Stands for every protocol that is not in WITH_PORTS.
PORTLESS: Final = -1
WITH_PORTS: Final = frozenset((TCP, UDP, ICMP, ICMPV6))
PORT_MAX: Final = 65535
_KEYS: Final = frozenset(
    ("direction", "protocol", "from", "to", "from_ports", "ports", "action", "priority", "log", "audit_only")
)
_PORTS: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?\Z")


_BOTH: Final = frozenset((4, 6))
_OWN_VERSIONS: Final = {ICMP: frozenset((4,)), ICMPV6: frozenset((6,))}


class Direction(Enum):
    """Seen from the guest."""

    OUT = "out"
    IN = "in"


class Action(IntEnum):
    """The fate of a packet. REJECT is DENY with an answer to the sender."""

    ALLOW = 1
    DENY = 2
    REJECT = 3


class RuleError(ValueError):
    """A rule contradicts itself; the text names the rule, what was given and what is allowed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. Empty tuples and None mean any; ports are inclusive ranges (for ICMP the destination port is
    the type).
    """

    name: str
    action: Action
    direction: Direction | None = None
    protocol: int | None = None
    source: tuple[Network, ...] = ()
    destination: tuple[Network, ...] = ()
    source_ports: tuple[tuple[int, int], ...] = ()
    destination_ports: tuple[tuple[int, int], ...] = ()
    priority: int = 100
    log: bool = False
    audit_only: bool = False
    origin: str = ""  # where it is inherited from: a VM, a group, "default"

    def __post_init__(self) -> None:
        if not self.name:
            raise RuleError("a rule has an empty name")
        if self.protocol is not None and self.protocol != PORTLESS and not 0 <= self.protocol <= 255:
            raise RuleError(f"rule {self.name}: protocol {self.protocol} is outside 0..255")
        ports = (*self.source_ports, *self.destination_ports)
        if ports and self.protocol not in WITH_PORTS:
            raise RuleError(f"rule {self.name}: ports need a protocol that has them (tcp, udp, icmp, icmpv6)")
        for first, last in ports:
            if not 0 <= first <= last <= PORT_MAX:
                raise RuleError(f"rule {self.name}: ports {first}-{last} are not a range in 0..{PORT_MAX}")
        if self.source and self.destination and not (_versions(self.source) & _versions(self.destination)):
            raise RuleError(f"rule {self.name}: source and destination have no IP version in common")

    def versions(self) -> frozenset[int]:
        """The IP versions that it can match."""
        own = _OWN_VERSIONS.get(self.protocol or 0, _BOTH)
        return own & (_versions(self.source) or _BOTH) & (_versions(self.destination) or _BOTH)


def parse(name: str, table: Mapping[str, Any], *, origin: str = "") -> Rule:
    """A rule from its table in a configuration file.

    Keys: direction "in" or "out", protocol (name or number), from and to (address or CIDR, or a list),
    from_ports and ports ("80", "8000-8100", or a list), action "allow", "deny" or "reject", priority, log,
    audit_only. Raises RuleError.
    """
    unknown = set(table) - _KEYS
    if unknown:
        raise RuleError(f"rule {name}: unknown key {min(unknown)!r}; known are {', '.join(sorted(_KEYS))}")
    try:
        action = Action[str(table["action"]).upper()]
        direction = Direction(table["direction"]) if "direction" in table else None
    except (KeyError, ValueError) as error:
        raise RuleError(
            f"rule {name}: {error}; action is allow, deny or reject, direction in or out"
        ) from None
    return Rule(
        name,
        action,
        direction,
        _protocol(name, table.get("protocol")),
        _networks(name, table.get("from")),
        _networks(name, table.get("to")),
        _ports(name, table.get("from_ports")),
        _ports(name, table.get("ports")),
        int(table.get("priority", 100)),
        bool(table.get("log", False)),
        bool(table.get("audit_only", False)),
        origin,
    )


def _versions(networks: tuple[Network, ...]) -> frozenset[int]:
    return frozenset(network.version for network in networks)


def _protocol(name: str, value: object) -> int | None:
    if value is None or value == "any":
        return None
    if isinstance(value, int):
        return value
    if value not in PROTOCOLS:
        raise RuleError(f"rule {name}: protocol {value!r}; known are {', '.join(PROTOCOLS)} and numbers")
    return PROTOCOLS[str(value)]


def _networks(name: str, value: object) -> tuple[Network, ...]:
    try:
        return tuple(ip_network(str(one)) for one in _listed(value))
    except ValueError as error:
        raise RuleError(f"rule {name}: {error}; an address is written like 10.0.0.0/8") from None


def _ports(name: str, value: object) -> tuple[tuple[int, int], ...]:
    found = []
    for one in _listed(value):
        match = _PORTS.match(str(one))
        if match is None:
            raise RuleError(f"rule {name}: port {one!r}; ports are written like 80 or 8000-8100")
        found.append((int(match[1]), int(match[2] or match[1])))
    return tuple(found)


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]

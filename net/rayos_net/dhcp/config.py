"""The configuration of a subnet's DHCP server: one frozen value, checked when it is made.

Invariant: every address in it lies in the network, the pool does not hold the network, broadcast or server
address, and times are in order, so the server need not check again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Final

_MAC: Final = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\Z")
LEASE_MIN: Final = 10  # seconds; below, T1 and T2 come closer together than a retransmission
V6ONLY_WAIT_MIN: Final = 300  # seconds (RFC 8925, 3.4)
MTU_MIN: Final = 68  # RFC 2132, 5.1


class ConfigError(ValueError):
    """A subnet's configuration contradicts itself; the text says what was given and what is allowed."""


@dataclass(frozen=True, slots=True)
class BootFile:
    """The file that a network-booting client loads: TFTP server address and name, or a URL for HTTP boot."""

    file: str
    next_server: IPv4Address | None = None
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds for one port (a tap; on a plain link, a hardware address). None means without bound."""

    leases_per_port: int | None = 4
    requests_per_second: float | None = 20.0
    burst: int = 40
    quarantined_per_port: int = 8  # addresses that its DECLINEs may block at a time

    @classmethod
    def none(cls) -> "Limits":
        """No bounds: for load tests and trusted links."""
        return cls(leases_per_port=None, requests_per_second=None, quarantined_per_port=1 << 30)


@dataclass(frozen=True, slots=True)
class SubnetConfig:
    """One subnet. `pool` is a tuple of inclusive (first, last) ranges; empty means the whole network.

    `reservations` maps a MAC (``52:59:…``) to its address, `host_names` a MAC to the name it is given,
    `boot` a client architecture (RFC 4578, or "ipxe", or "default") to what it boots. `relays` are the
    networks from which relay agents are believed. Raises ConfigError when something does not fit.
    """

    network: IPv4Network
    server: IPv4Address
    pool: tuple[tuple[IPv4Address, IPv4Address], ...] = ()
    lease_seconds: int = 3600
    lease_seconds_min: int = 120
    lease_seconds_max: int = 86400
    router: IPv4Address | None = None
    dns: tuple[IPv4Address, ...] = ()
    domain: str | None = None
    search: tuple[str, ...] = ()
    ntp: tuple[IPv4Address, ...] = ()
    mtu: int | None = None
    routes: tuple[tuple[IPv4Network, IPv4Address], ...] = ()
    reservations: Mapping[str, IPv4Address] = field(default_factory=dict)
    host_names: Mapping[str, str] = field(default_factory=dict)
    boot: Mapping[int | str, BootFile] = field(default_factory=dict)
    relays: tuple[IPv4Network, ...] = ()
    reserved_only: bool = False  # serve nobody without a reservation
    authoritative: bool = True  # we are the only server: answer unknown INIT-REBOOT clients with NAK
    rapid_commit: bool = False
    ipv6_only_wait_seconds: int | None = None
    offer_seconds: float = 30.0
    quarantine_seconds: float = 600.0
    probe_seconds: float = 0.1  # how long an ARP probe waits for an answer before a first offer; 0: no probe
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.network.prefixlen > 30:
            raise ConfigError(
                f"{self.network} has no room for a server and a client; /30 or larger is needed"
            )
        reserved = (self.network.network_address, self.network.broadcast_address)
        if self.server not in self.network or self.server in reserved:
            raise ConfigError(f"server {self.server} is no host address in {self.network}")
        for first, last in self.pool:
            if first > last:
                raise ConfigError(f"pool {first}-{last} ends before it begins")
            if first not in self.network or last not in self.network:
                raise ConfigError(f"pool {first}-{last} leaves {self.network}")
        if self.router is not None and self.router not in self.network:
            raise ConfigError(f"router {self.router} is not in {self.network}")
        for mac, address in self.reservations.items():
            self.check_reservation(mac, address)
        if len(set(self.reservations.values())) != len(self.reservations):
            raise ConfigError("one address is reserved for two MACs")
        low, usual, high = self.lease_seconds_min, self.lease_seconds, self.lease_seconds_max
        if not LEASE_MIN <= usual <= high:
            raise ConfigError(f"lease of {usual} s is outside {LEASE_MIN}..{high} s")
        if low > usual:
            object.__setattr__(self, "lease_seconds_min", usual)
        if self.mtu is not None and not MTU_MIN <= self.mtu <= 65535:
            raise ConfigError(f"MTU {self.mtu} is outside {MTU_MIN}..65535")
        wait = self.ipv6_only_wait_seconds
        if wait is not None and wait < V6ONLY_WAIT_MIN:
            raise ConfigError(f"IPv6-only wait of {wait} s is below {V6ONLY_WAIT_MIN} s")

    def check_reservation(self, mac: str, address: IPv4Address) -> None:
        """Raise ConfigError unless `mac` is well formed and `address` a host address of ours other than the
        server's.
        """
        if not _MAC.match(mac):
            raise ConfigError(f"reservation for {mac!r}: a MAC is written like 52:59:00:00:00:01")
        ends = (self.network.network_address, self.network.broadcast_address, self.server)
        if address not in self.network or address in ends:
            raise ConfigError(f"reservation {mac} = {address} is no free host address in {self.network}")

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The pool as ranges of integers, inclusive."""
        if not self.pool:
            return ((int(self.network.network_address) + 1, int(self.network.broadcast_address) - 1),)
        return tuple((int(first), int(last)) for first, last in self.pool)

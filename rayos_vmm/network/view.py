"""The guests' network as callers see it: leases, the DHCP server, what was said, verdicts of a firewall."""

from __future__ import annotations

import msgspec


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what callers see."""


class Lease(View, frozen=True):
    """An address, and the card that has it; `expires` in seconds since the epoch."""

    address: str
    mac: str
    state: str
    expires: float
    host_name: str | None
    port: str


class NamesView(View, frozen=True):
    """The DNS server: its domain, why it does not serve (empty when it does), its counters."""

    domain: str
    trouble: str
    counters: dict[str, int]


class UpstreamView(View, frozen=True):
    """The client of a machine with an upstream address: its state and lease, and what its guest was answered."""

    state: str
    bridge: str
    address: str | None
    server: str | None
    guest: dict[str, int]


class DhcpStatus(View, frozen=True):
    """The server: its link and subnet, why it does not serve, leases by state, counters; names, upstream clients."""

    serving: bool
    trouble: str
    link: str
    subnet: str
    leases: dict[str, int]
    counters: dict[str, int]
    names: NamesView
    upstream: dict[str, UpstreamView]


class Exchange(View, frozen=True):
    """A card's request to our server, and the answer; `why` where that was nothing."""

    at: float
    port: str
    mac: str | None
    xid: int | None
    request: str | None
    answer: str | None
    address: str | None
    why: str | None


class Transaction(View, frozen=True):
    """A message of a machine's upstream client: how often it was sent, and what came of it."""

    at: float
    xid: int
    kind: str
    attempts: int
    outcome: str | None


class DhcpLogs(View, frozen=True):
    """The last exchanges of our server, and the last transactions of machines' upstream clients."""

    server: list[Exchange]
    clients: dict[str, list[Transaction]]

"""A network that is an address and some leases: what `rayos_vmm.network.firewall` asks of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network


@dataclass(frozen=True)
class FixedNetwork:
    """`leases`: addresses by MAC."""

    subnet: IPv4Network
    leases: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def addresses_of(self, mac: str) -> Sequence[str]:
        return self.leases.get(mac, ())

"""Leases: those that our DHCP gave out, those of the machines upstream, and who has to know of each."""

from __future__ import annotations

from rayos_vmm.network.bridge import HostNetwork
from rayos_vmm.network.firewall import Firewall
from rayos_vmm.network.view import DhcpLogs, DhcpStatus, Lease
from rayos_vmm.service.registry import Registry


class LeaseListener:
    """Tells the firewall and the machine of each lease, before its guest hears of it."""

    def __init__(self, registry: Registry, firewall: Firewall) -> None:
        self._registry = registry
        self._firewall = firewall

    def note_lease(self, mac: str, address: str, is_bound: bool) -> None:
        """DHCP gave an address to a card, or took it back: it is the address of the machine that has it."""
        if is_bound:
            self._firewall.bind(mac, address)
            self._registry.note_address(mac, address)
        else:
            self._firewall.unbind(mac, address)

    async def commit(self) -> None:
        """Returns when the guards in the kernel know the leases, too."""
        await self._firewall.commit()

    def names_by_mac(self) -> dict[str, str]:
        """The name of the machine that has a card, by its MAC."""
        return self._registry.names_by_mac()


class Dhcp:
    """The service's DHCP, to be asked."""

    def __init__(self, network: HostNetwork, registry: Registry) -> None:
        self._network = network
        self._registry = registry

    async def leases(self) -> list[Lease]:
        """The addresses that our DHCP gave out."""
        return await self._network.leases()

    async def status(self) -> DhcpStatus:
        """Our DHCP server: its link and subnet, or why it does not serve; leases by state; counters."""
        return self._network.dhcp_status()

    async def logs(self, name: str | None = None) -> DhcpLogs:
        """The last exchanges of our DHCP server, and the last transactions of the machines' upstream clients.

        Raises:
            NotFound: there is no machine of that name.
        """
        exchanges, histories = self._network.exchanges(), self._network.upstreams.histories()
        if name is not None:
            record = self._registry.find(name).record
            exchanges = [one for one in exchanges if one.port == record.live.tap or one.mac == record.mac]
            histories = {vm: kept for vm, kept in histories.items() if vm == name}
        return DhcpLogs(server=exchanges, clients=histories)

    async def renew(self, name: str) -> None:
        """Renews the lease that a machine has upstream, now rather than at half time.

        Raises:
            NotFound: there is no machine of that name.
            Conflict: it has no upstream address.
        """
        self._registry.find(name)
        self._network.upstreams.renew(name)

    async def release(self, address: str) -> None:
        """Takes a lease back; its guest is refused when it renews, and asks anew.

        Raises:
            Invalid: that is no address.
            NotFound: nobody has a lease for it.
            Busy: our DHCP server does not run.
        """
        self._network.release(address)

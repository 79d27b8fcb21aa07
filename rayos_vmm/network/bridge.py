"""The guests' network on the host: one bridge, a tap for each machine, our DHCP server on the bridge.

Invariant: what is opened here is ours alone (marked links) and is gone or reusable after a crash. Without the
privilege to make links the service runs all the same; machines that want a network are then refused with the
reason. pyroute2 brings an event loop of its own, which trio-asyncio allows in other threads only.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import msgspec
import trio

from rayos_net import tap
from rayos_net.dhcp.binding import BindingState, EventKind, LeaseEvent
from rayos_net.dhcp.config import SubnetConfig
from rayos_net.dhcp.service import DhcpError, DhcpService, serve_dhcp
from rayos_net.link import LinkError, Links
from rayos_net.naming import mac, tap_name
from rayos_vmm.config.settings import ServiceConfig
from rayos_vmm.errors import Busy, Invalid, NotFound
from rayos_vmm.events import EventLog
from rayos_vmm.network.names import DOMAIN, GuestNames
from rayos_vmm.network.upstream import Upstreams
from rayos_vmm.network.view import DhcpStatus, Exchange, Lease

LOG: Final = logging.getLogger(__name__)
_ALTERNATIVES: Final = ipaddress.IPv4Network("10.86.0.0/16")
_TRIES: Final = 32
_REMOVE_TIMEOUT_S: Final = 5.0


class LeaseListener(Protocol):
    """Who has to know of a lease before its guest does."""

    def note_lease(self, mac: str, address: str, is_bound: bool) -> None:
        """A card has this address from now on, or no longer."""
        ...

    async def commit(self) -> None:
        """Returns when all that was noted is in force; then the lease is acknowledged."""
        ...

    def names_by_mac(self) -> Mapping[str, str]:
        """The machines' names by their card's address."""
        ...


class HostNetwork:
    """The bridge, the taps and the leases. `trouble` says why there is no network, if there is none."""

    def __init__(self, config: ServiceConfig, state: Path, events: EventLog) -> None:
        self.upstreams = Upstreams(state / "upstream", events)
        self.bridge = config.bridge
        self.subnet = config.network_address
        self.trouble = ""
        self.names = GuestNames()
        self._resolver = config.resolver
        self._dhcp: DhcpService | None = None
        self._config = config
        self._store = state / "leases.db"
        self._events = events

    def mac(self, vm: str) -> str:
        """The address that a machine's network card has unless the specification says otherwise."""
        return mac(vm)

    async def open_tap(
        self, vm: str, mac: str, *, mtu: int, queues: int, upstream: str | None = None
    ) -> tuple[str, list[int]]:
        """A machine's tap: its name and a descriptor for each queue, which the caller closes.

        It is in our bridge; or in the bridge `upstream`, where its address is acquired from now on.

        Raises:
            Busy: there is no network here, or the tap's name is in use.
        """
        if self.trouble and upstream is None:
            raise Busy(
                f"there is no network for {vm}: {self.trouble}",
                hint="run the service as root, or switch the machine's network off (net.enabled = false)",
                code="no_network",
            )
        name, bridge = tap_name(vm), upstream or self.bridge

        def open_tap() -> list[int]:
            with Links() as links:
                fds = [links.open_tap(name, bridge=bridge, owner=vm, mtu=mtu, multi_queue=queues > 1)]
                try:
                    while len(fds) < queues:
                        fds.append(tap.add_queue(name))
                except OSError:
                    for fd in fds:
                        os.close(fd)
                    raise
                return fds

        try:
            fds = await trio.to_thread.run_sync(open_tap)
        except LinkError as error:
            raise Busy(str(error)) from None
        except OSError as error:
            raise Busy(f"tap {name}: no further queue: {error.strerror}") from None
        try:
            if upstream is not None:
                await self.upstreams.follow(vm, port=name, bridge=upstream, mac=mac)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return name, fds

    async def adopt(self, vm: str, tap: str, mac: str, upstream: str) -> None:
        """A machine that outlived the former service has its lease looked after again."""
        with suppress(Busy):  # told as an event: the guest goes on with what it has
            await self.upstreams.follow(vm, port=tap, bridge=upstream, mac=mac)

    async def leases(self) -> list[Lease]:
        """The bindings as plain values, by address."""
        own = [] if self._dhcp is None else self._dhcp.leases()
        return self.upstreams.leases() + [
            Lease(
                address=str(one.address),
                mac=one.mac,
                state=one.state.value,
                expires=one.expires,
                host_name=one.host_name,
                port=one.port,
            )
            for one in own
        ]

    def dhcp_status(self) -> DhcpStatus:
        """The server at a glance: its link and subnet, why it does not serve, leases by state, counters."""
        leases = [] if self._dhcp is None else self._dhcp.leases()
        return DhcpStatus(
            serving=self._dhcp is not None,
            trouble=self.trouble,
            link=self.bridge,
            subnet=str(self.subnet),
            leases=dict(sorted(Counter(one.state.value for one in leases).items())),
            counters={} if self._dhcp is None else dict(sorted(self._dhcp.counters.items())),
            names=self.names.status(),
            upstream=self.upstreams.status(),
        )

    def release(self, address: str) -> None:
        """Takes a lease back.

        Raises:
            Invalid: that is no address.
            NotFound: nobody has a lease for it.
            Busy: the server does not run.
        """
        try:
            parsed = ipaddress.IPv4Address(address)
        except ValueError:
            raise Invalid(f"{address[:40]!r} is not an IPv4 address") from None
        if self._dhcp is None:
            why = self.trouble or "it has not started"
            raise Busy(f"our DHCP server does not run: {why}", code="no_network")
        if not self._dhcp.release(parsed):
            raise NotFound(f"nobody has a lease for {parsed}", hint="`rayos dhcp leases` lists them")

    def exchanges(self) -> list[Exchange]:
        """Returns the last exchanges of our server, the oldest first: at most 16 for each port."""
        said = [] if self._dhcp is None else [one.describe() for one in self._dhcp.exchanges()]
        return msgspec.convert(said, list[Exchange])

    def forget(self, mac: str) -> None:
        """The machine with this card is gone: its lease and its name are free."""
        self.upstreams.forget(mac)
        for one in [] if self._dhcp is None else self._dhcp.leases():
            if one.mac == mac and one.state is BindingState.BOUND and self._dhcp is not None:
                self._dhcp.release(one.address)

    def addresses_of(self, mac: str) -> list[str]:
        """The addresses that a card has a lease for now."""
        own = [] if self._dhcp is None else self._dhcp.leases()
        bound = [str(one.address) for one in own if one.mac == mac and one.state is BindingState.BOUND]
        return bound + self.upstreams.addresses_of(mac)

    def _take_event(self, event: LeaseEvent, listener: LeaseListener) -> None:
        address, card = str(event.binding.address), event.binding.mac
        self._events.publish(f"dhcp.{event.kind.value}", None, address=address, mac=card)
        self.names.take(event.binding, listener.names_by_mac())
        listener.note_lease(card, address, event.kind in (EventKind.BOUND, EventKind.RENEWED))

    def _candidates(self, links: Links, *, is_fixed: bool) -> Iterator[ipaddress.IPv4Network]:
        """The subnets to try: what the bridge has already, what is configured, others of the same size."""
        if links.exists(self.bridge) and not is_fixed:
            yield from (one.network for one in links.addresses(self.bridge))
        yield self.subnet
        if is_fixed or not self.subnet.subnet_of(_ALTERNATIVES):
            return
        others = _ALTERNATIVES.subnets(new_prefix=self.subnet.prefixlen)
        yield from (one for one, _ in zip(others, range(_TRIES), strict=False) if one != self.subnet)

    def make_bridge(self, *, is_fixed: bool) -> None:
        """Brings the bridge up on the first subnet that is free here. Blocking (netlink): call it in a thread.

        Raises:
            LinkError: none is, or this process may not.
        """
        first: LinkError | None = None
        with Links() as links:
            for subnet in self._candidates(links, is_fixed=is_fixed):
                address = ipaddress.IPv4Interface((subnet.network_address + 1, subnet.prefixlen))
                try:
                    links.ensure_bridge(self.bridge, address)
                except LinkError as error:
                    if "overlaps" not in str(error):
                        raise
                    first = first or error
                else:
                    self.subnet = subnet
                    return
        raise first or LinkError(f"no subnet for {self.bridge}")

    def remove_bridge(self) -> None:
        """Removes the bridge unless a guest is in it. Blocking: call it in a thread."""
        with Links() as links:
            links.remove_bridge(self.bridge)

    async def serve(
        self, listener: LeaseListener, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """DHCP and DNS on the bridge until cancelled; trouble ends the network, not the service."""
        is_serving = False
        server = self.subnet.network_address + 1
        first, last = self.subnet.network_address + 2, self.subnet.broadcast_address - 1
        try:
            async with trio.open_nursery() as nursery:
                names = partial(self.names.serve, self.bridge, self.subnet, self._resolver, self._events)
                await nursery.start(names)
                subnet = SubnetConfig(
                    self.subnet,
                    server,
                    ((first, last),),
                    # Installers insist on a default route; the firewall decides what may take it.
                    router=server,
                    dns=(server,) if self.names.is_serving else (),
                    domain=DOMAIN,
                    probe_seconds=0.0,
                )
                self._dhcp = await nursery.start(
                    lambda task_status: serve_dhcp(
                        self.bridge,
                        subnet,
                        store=self._store,
                        events=lambda event: self._take_event(event, listener),
                        committed=listener.commit,
                        task_status=task_status,
                    )
                )
                for binding in self._dhcp.leases():
                    self.names.take(binding, listener.names_by_mac())
                is_serving = True
                task_status.started()
        except* DhcpError as group:
            self.trouble = str(group.exceptions[0])
            LOG.error("DHCP has stopped", extra={"why": self.trouble})
            self._events.publish("network.failed", None, reason=self.trouble)
        finally:
            self._dhcp = None
        if not is_serving:
            task_status.started()

    async def bring_up(self) -> None:
        """Makes the bridge, or says in `trouble` why there is none."""
        if not self._config.network:
            self.trouble = "it is switched off (service.network = false)"
            return
        try:
            await trio.to_thread.run_sync(partial(self.make_bridge, is_fixed=self._config.subnet_is_fixed))
        except LinkError as error:
            self.trouble = str(error)
            LOG.warning("There is no network for guests", extra={"why": self.trouble})


@asynccontextmanager
async def serve_network(network: HostNetwork, listener: LeaseListener) -> AsyncIterator[None]:
    """Serves the guests, and tells `listener` of leases. Leaving it removes the bridge unless a guest is in it."""
    await network.bring_up()
    has_bridge = not network.trouble
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(network.upstreams.serve, listener.note_lease)
            if has_bridge:
                await nursery.start(network.serve, listener)
            yield
        finally:
            nursery.cancel_scope.cancel()
            if has_bridge:
                with trio.move_on_after(_REMOVE_TIMEOUT_S, shield=True):
                    await trio.to_thread.run_sync(network.remove_bridge)

"""Our DHCP client on a real link, against our own server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv4Interface
from typing import Any

import pytest
import trio

from rayos_net.dhcp.binding import EventKind
from rayos_net.dhcp.client_action import Acquired, ClientConfig, Informed, Lost
from rayos_net.dhcp.client_service import DhcpClient, Told, run_client
from rayos_net.dhcp.client_state import ClientState
from rayos_net.dhcp.config import Limits
from rayos_net.dhcp.conflict import QUICK
from rayos_net.dhcp.lease import Lease
from tests.integration.net.lab import Lab
from tests.integration.net.serving import serving, subnet

pytestmark = pytest.mark.root
MAC = b"\x52\x59\0\0\0\1"


@dataclass
class Running:
    """A client and what it told."""

    client: DhcpClient
    told: list[Told] = field(default_factory=list)
    changed: list[trio.Event] = field(default_factory=list)

    async def until(self, kind: type[Told], *, count: int = 1, timeout_s: float = 20.0) -> Any:
        """Wait until the client told `kind` for the `count`th time; return that one."""
        with trio.fail_after(timeout_s):
            while True:
                found = [one for one in self.told if isinstance(one, kind)]
                if len(found) >= count:
                    return found[count - 1]
                self.changed.append(trio.Event())
                await self.changed[-1].wait()


@asynccontextmanager
async def client(
    lab: Lab, *, mac: bytes = MAC, stored: Lease | None = None, **config: Any
) -> AsyncIterator[Running]:
    """A client on the lab's client side, with quick conflict detection."""
    usual: dict[str, Any] = {
        "times": QUICK,
        "retransmit": 0.5,
        "collect": 0.1,
        "host_name": "guest",
        "is_answering_arp": True,
    }
    told: list[Told] = []
    changed: list[trio.Event] = []

    def tell(one: Told) -> None:
        told.append(one)
        for event in changed:
            event.set()
        changed.clear()

    settings = ClientConfig(mac, **{**usual, **config})
    async with trio.open_nursery() as nursery:
        with lab.entered():
            start = partial(run_client, lab.client_link, settings, tell, stored=stored)
            running = await nursery.start(start)
        yield Running(running, told, changed)
        nursery.cancel_scope.cancel()


async def test_an_address_that_another_host_has_is_declined(lab: Lab) -> None:
    """Three probes find the other host; the server hears a DECLINE."""
    config = subnet(lab, probe_seconds=0, pool=((IPv4Address("10.77.0.10"), IPv4Address("10.77.0.20")),))
    lab.add_address("10.77.0.10/32")
    async with serving(lab, config) as server, client(lab) as running:
        declined = await server.until(EventKind.DECLINED)
        assert declined.binding.address == IPv4Address("10.77.0.10")
        assert running.client.state is ClientState.DECLINED
        lease = (await running.until(Acquired)).lease  # after the ten seconds of RFC 2131, 3.1
    assert lease.address.ip == IPv4Address("10.77.0.11")


async def test_when_its_server_dies_another_one_extends_the_lease(lab: Lab) -> None:
    """T1 passes unanswered, at T2 the client asks everybody, and the second server, which has the leases,
    answers.
    """
    config = subnet(lab, lease_seconds=10, lease_seconds_max=10)
    async with client(lab, renew_minimum=1.0) as running:
        async with serving(lab, config) as first:
            lease = (await running.until(Acquired)).lease
            await first.until(EventKind.BOUND)
        lab.add_address("10.77.0.9/16")
        second = subnet(lab, lease_seconds=60, server=IPv4Address("10.77.0.9"))
        async with serving(lab, second) as living:  # deaf to renewals, which go to the dead one
            extended = (await running.until(Acquired, count=2)).lease
            assert living.service.counters["drop_not_for_us"] >= 1
    assert extended.address == lease.address
    assert extended.server == IPv4Address("10.77.0.9")
    assert not any(isinstance(one, Lost) for one in running.told)


async def test_without_a_server_it_uses_its_static_address(lab: Lab) -> None:
    """And announces it; a server that appears is preferred."""
    fallback = IPv4Interface("10.77.200.1/16")
    async with client(lab, attempts=2, retransmit=0.2, error_pause=0.5, fallback=fallback) as running:
        lease = (await running.until(Acquired)).lease
        assert (lease.address, lease.is_static) == (fallback, True)
        async with serving(lab):
            lease = (await running.until(Acquired, count=2)).lease
    assert not lease.is_static


async def test_inform_is_answered(lab: Lab) -> None:
    """Parameters for an address set by hand, with no lease for it."""
    lab.run(["ip", "address", "add", "10.77.200.1/16", "dev", "c0"])
    mac = bytes.fromhex(lab.client_mac().replace(":", ""))
    async with serving(lab) as server, client(lab, mac=mac, initial_delay=1000.0) as running:
        running.client.inform(IPv4Address("10.77.200.1"))
        told: Informed = await running.until(Informed)
        assert told.options[6] == lab.address.ip.packed
        assert server.service.leases() == []


@pytest.mark.parametrize("count", [8, 64])
async def test_many_clients_at_once_get_an_address_each(lab: Lab, count: int) -> None:
    """One client for each VM, all on one link, all within seconds."""
    config = subnet(lab, limits=Limits.none())
    found: dict[bytes, IPv4Address] = {}

    async def one(mac: bytes) -> None:
        async with client(lab, mac=mac) as running:
            found[mac] = (await running.until(Acquired)).lease.address.ip

    async with serving(lab, config) as server:
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(one, MAC[:5] + bytes((number,)))
        leases = {one.hardware: one.address for one in server.service.leases()}
    assert len(set(found.values())) == count
    assert found == leases

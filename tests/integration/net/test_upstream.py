"""A guest's port in a bridge with an uplink: somebody else's DHCP server, our client there, udhcpc behind us."""

import json
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import trio

from rayos_net import nft
from rayos_net.dhcp.client_action import Acquired, Lost
from rayos_net.dhcp.lease import Lease
from rayos_net.dhcp.message import MessageType
from rayos_net.dhcp.upstream import Event, Given, Upstream, barrier, run_upstream, unbar
from tests.integration.net.lab import Lab
from tests.integration.net.peers import SERVERS, Subnet, dhcp_server, running
from tests.integration.net.serving import told

pytestmark = pytest.mark.root
UP = Subnet(link="c0", address="10.77.0.2")


@dataclass
class Side:
    """A guest's port: the Upstream and what it told."""

    upstream: Upstream
    events: list[Event] = field(default_factory=list)
    changed: trio.Event = field(default_factory=trio.Event)

    def take(self, event: Event) -> None:
        self.events.append(event)
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, kind: type[Event], *, count: int = 1, timeout_s: float = 30.0) -> Any:
        """The `count`th event of this kind."""
        with trio.fail_after(timeout_s):
            while True:
                found = [one for one in self.events if isinstance(one, kind)]
                if len(found) >= count:
                    return found[count - 1]
                await self.changed.wait()


@pytest.fixture
def guests(lab: Lab) -> Iterator[str]:
    """The namespace with the guest's end, h1; its port is h0 of the bridge br0, whose uplink leads to c0."""
    lab.run(["ip", "address", "add", "10.77.0.2/16", "dev", "c0"])
    with lab.host_with_address("10.77.200.1") as third:
        subprocess.run(["ip", "-n", third, "address", "flush", "dev", "h1"], check=True)
        nft.run(barrier(["h0"]))
        yield third


def add_guests(namespace: str, ports: Sequence[str]) -> None:
    """More ports of br0, each with its end, eNAME, in the guests' namespace."""
    batch = "".join(
        f"link add {port} master br0 type veth peer name e{port} netns {namespace}\nlink set {port} up\n"
        for port in ports
    )
    subprocess.run(["ip", "-b", "-"], input=batch, text=True, check=True)
    ends = "".join(f"link set e{port} up\n" for port in ports)
    subprocess.run(["ip", "-n", namespace, "-b", "-"], input=ends, text=True, check=True)
    nft.run(barrier(ports))


def mac_of(namespace: str, link: str) -> bytes:
    """A link's hardware address."""
    shown = subprocess.check_output(["ip", "-n", namespace, "-j", "link", "show", link])
    return bytes.fromhex(json.loads(shown)[0]["address"].replace(":", ""))


@asynccontextmanager
async def side(lab: Lab, namespace: str, *, port: str = "h0", link: str = "h1") -> AsyncIterator[Side]:
    """The port served, the lease of the guest's MAC asked for on br0."""
    hardware = mac_of(namespace, link)
    holder: list[Side] = []
    start = partial(
        run_upstream,
        port,
        "br0",
        hardware,
        lambda event: holder[0].take(event),
        store=lab.directory / f"{port}.json",
        host_name="guest",
    )
    async with trio.open_nursery() as nursery:
        holder.append(Side(await nursery.start(start)))
        yield holder[0]
        nursery.cancel_scope.cancel()


async def udhcpc(namespace: str, hook: Path, *more: str, link: str = "h1") -> str:
    """A whole acquisition in the guest's namespace; what it said."""
    argv = ["ip", "netns", "exec", namespace, "busybox", "udhcpc", "-f", "-n", "-q", "-i", link]
    argv += ["-s", str(hook), "-t", "8", "-T", "2", "-O", "ntpsrv", *more]
    with trio.fail_after(60):
        done = await trio.run_process(argv, capture_stderr=True, capture_stdout=True, check=False)
    text: str = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, text
    return text


@pytest.mark.parametrize("name", SERVERS)
async def test_the_guest_gets_exactly_the_upstream_lease(
    lab: Lab, guests: str, hook: Path, name: str
) -> None:
    """The guest has the upstream's address, router, name servers, domain, NTP and time. The upstream server hears our
    client alone, the guest us alone; a renewal here follows the client's there.
    """
    async with dhcp_server(lab, name, UP, in_client=True), side(lab, guests) as guest:
        lease: Lease = (await guest.until(Acquired)).lease
        assert f"lease of {lease.address.ip} obtained from 10.77.0.2" in await udhcpc(guests, hook)
        env = told(lab, "bound")
        assert (env["ip"], env["mask"], env["router"]) == (str(lease.address.ip), "16", "10.77.0.2")
        assert (env["dns"], env["domain"], env["ntpsrv"]) == (
            "10.77.0.2 10.77.0.99",
            "up.example",
            "10.77.0.5",
        )
        assert 3500 < int(env["lease"]) <= 3600
        assert [one.kind for one in guest.events if isinstance(one, Given)] == [MessageType.ACK]
        guest.upstream.client.renew()
        renewed: Lease = (await guest.until(Acquired, count=2)).lease
        assert (renewed.address, renewed.expires > lease.expires) == (lease.address, True)
        assert guest.upstream.counters["offer"] == 1
        show = ["nft", "list", "table", "bridge", "rayos_upstream"]
        counted = await trio.run_process(lab.in_server(show), capture_stdout=True)
        assert b"counter packets 0" not in counted.stdout.split(b"to_guests")[0]  # the guest's were stopped
    again = Lease.loads((lab.directory / "h0.json").read_text())
    assert again == renewed
    async with dhcp_server(lab, name, UP, in_client=True), side(lab, guests) as guest:
        assert (await guest.until(Acquired)).lease.address == lease.address
        history = guest.upstream.client.history()
        assert [one["kind"] for one in history] == ["REQUEST"]  # INIT-REBOOT with what was stored


async def test_what_is_lost_upstream_is_refused_and_renewed(lab: Lab, guests: str, hook: Path) -> None:
    """The upstream server refuses the renewal: the guest's own is refused, and its next DISCOVER gets the new
    lease.
    """
    async with side(lab, guests) as guest:
        async with dhcp_server(lab, "dnsmasq", replace(UP, seconds=120), in_client=True):
            old: Lease = (await guest.until(Acquired)).lease
            await udhcpc(guests, hook)
        (lab.directory / "dnsmasq.leases").unlink()
        other = replace(UP, seconds=120, first="10.77.1.240")
        async with dhcp_server(lab, "dnsmasq", other, in_client=True):
            guest.upstream.client.renew()
            lost: Lost = await guest.until(Lost)
            assert (lost.lease.address, lost.reason) == (old.address, "refused by the server")
            new: Lease = (await guest.until(Acquired, count=2)).lease
            assert new.address != old.address
            # A client that believes in its former address: refused, then it begins anew.
            text = await udhcpc(guests, hook, "-r", str(old.address.ip))
            assert f"lease of {new.address.ip} obtained" in text


async def test_the_guests_release_and_decline_reach_the_upstream_server(
    lab: Lab, guests: str, hook: Path
) -> None:
    """A guest that finds its address in use gets another one; one that gives it back, gives it back there."""
    few = replace(UP, first="10.77.1.247")
    async with dhcp_server(lab, "dnsmasq", few, in_client=True) as server, side(lab, guests) as guest:
        first: Lease = (await guest.until(Acquired)).lease
        # The host takes the address that the guest is about to be given: it is free when our client probes.
        lab.run(["ip", "address", "add", f"{first.address.ip}/32", "dev", "c0"])
        argv = ["ip", "netns", "exec", guests, "busybox", "udhcpc", "-f", "-R", "-a", "-i", "h1"]
        async with running([*argv, "-s", str(hook), "-t", "20", "-T", "2", "-A", "1"]) as client:
            await server.said(f"DHCPDECLINE(c0) {first.address.ip}")
            second: Lease = (await guest.until(Acquired, count=2)).lease
            assert second.address != first.address
            await guest.until(Given)
            await client.said(f"lease of {second.address.ip} obtained")
            client.process.terminate()
            await server.said(f"DHCPRELEASE(c0) {second.address.ip}")
            assert isinstance(await guest.until(Lost, count=2), Lost)


@pytest.mark.parametrize("count", [8, 64])
async def test_many_guests_at_once(lab: Lab, guests: str, hook: Path, count: int) -> None:
    """Each guest its own port, client and lease."""
    ports = [f"g{number}" for number in range(count)]
    add_guests(guests, ports)
    found: dict[str, IPv4Address] = {}

    async def one(port: str) -> None:
        async with side(lab, guests, port=port, link=f"e{port}") as opened:
            text = await udhcpc(guests, hook, link=f"e{port}")
            found[port] = IPv4Address(text.split("lease of ")[1].split()[0])
            held = opened.upstream.client.lease
            assert held is not None
            assert held.address.ip == found[port]

    async with dhcp_server(lab, "dnsmasq", UP, in_client=True), trio.open_nursery() as nursery:
        for port in ports:
            nursery.start_soon(one, port)
    assert len(set(found.values())) == count
    nft.run(unbar("g0"))


def test_a_barrier_names_its_ports_and_can_be_lifted(lab: Lab) -> None:
    """Applied twice, with one more port, and taken back: the kernel's set says so."""

    def members() -> Sequence[str]:
        shown = subprocess.check_output(["nft", "-j", "list", "set", "bridge", "rayos_upstream", "ports"])
        return next(one["set"].get("elem", []) for one in json.loads(shown)["nftables"] if "set" in one)

    nft.run(barrier(["ray-a-0"]))
    nft.run(barrier(["ray-a-0", "ray.k3v0q2ma.0"]))
    assert sorted(members()) == ["ray-a-0", "ray.k3v0q2ma.0"]
    nft.run(unbar("ray-a-0"))
    nft.run(unbar("never-there"))
    assert members() == ["ray.k3v0q2ma.0"]

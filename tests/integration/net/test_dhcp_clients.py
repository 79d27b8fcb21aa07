"""Our DHCP server against the clients that people run: busybox udhcpc, ISC dhclient, dhcpcd."""

import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import trio

from rayos_net.dhcp.binding import BindingState, EventKind
from tests.integration.net import peers
from tests.integration.net.lab import Lab
from tests.integration.net.serving import run, serving, subnet, told

pytestmark = pytest.mark.root


def udhcpc(hook: Path, *more: str) -> list[str]:
    return ["busybox", "udhcpc", "-f", "-n", "-i", "c0", "-s", str(hook), "-t", "4", "-T", "2", *more]


def dhclient(lab: Lab, hook: Path, *more: str) -> list[str]:
    lease, pid = lab.directory / "dhclient.leases", lab.directory / "dhclient.pid"
    lease.touch()
    files = ["-sf", str(hook), "-lf", str(lease), "-pf", str(pid), "-cf", "/dev/null"]
    return ["dhclient", "-4", "-v", *files, *more, "c0"]


@asynccontextmanager
async def running(lab: Lab, argv: Sequence[str]) -> AsyncIterator[trio.Process]:
    """A client in the background; terminated, and waited for, at the end."""
    async with trio.open_nursery() as nursery:
        start = partial(
            trio.run_process,
            lab.in_client(argv),
            check=False,
            cwd=lab.directory,
            capture_stdout=True,
            capture_stderr=True,
        )
        process: trio.Process = await nursery.start(start)
        yield process
        process.terminate()
        with trio.fail_after(10):
            await process.wait()


async def test_udhcpc_gets_an_address_and_every_option(lab: Lab, hook: Path) -> None:
    """The client of our own guests is told the address, router, DNS, NTP, domain and MTU."""
    async with serving(lab) as server:
        await run(lab, udhcpc(hook, "-q", "-O", "ntpsrv", "-O", "mtu", "-x", "hostname:probe"))
        lease = (await server.until(EventKind.BOUND)).binding
    seen = told(lab, "bound")
    assert seen["ip"] == str(lease.address)
    assert (seen["router"], seen["dns"], seen["ntpsrv"]) == ("10.77.0.1",) * 3
    assert (seen["domain"], seen["mtu"], seen["mask"], seen["lease"]) == ("guest.rayos", "1400", "16", "3600")
    assert lease.state is BindingState.BOUND
    assert lease.host_name == "probe"


async def test_udhcpc_declines_an_address_that_another_host_has(lab: Lab, hook: Path) -> None:
    """An address in use elsewhere is quarantined after DECLINE and the client gets another one."""
    config = subnet(lab, probe_seconds=0, pool=((IPv4Address("10.77.0.10"), IPv4Address("10.77.0.20")),))
    lab.add_address("10.77.0.10/32")  # our own side answers ARP for it
    async with serving(lab, config) as server:
        text = await run(lab, udhcpc(hook, "-q", "-a", "-A", "1"))
        assert "declining" in text
        assert (await server.until(EventKind.DECLINED)).binding.address == IPv4Address("10.77.0.10")
        states = {str(one.address): one.state for one in server.service.leases()}
    assert states["10.77.0.10"] is BindingState.DECLINED
    assert told(lab, "bound")["ip"] == "10.77.0.11"


async def test_an_address_that_answers_our_probe_is_never_offered(lab: Lab, hook: Path) -> None:
    """The ARP probe before a first offer finds a host that nobody told us about."""
    config = subnet(lab, pool=((IPv4Address("10.77.0.10"), IPv4Address("10.77.0.20")),))
    with lab.host_with_address("10.77.0.10"):
        async with serving(lab, config, link="br0") as server:
            await run(lab, udhcpc(hook, "-q"))
            counters = server.service.counters
    assert counters["probe_conflicts"] == 1
    assert told(lab, "bound")["ip"] == "10.77.0.11"


async def test_udhcpc_releases_its_address(lab: Lab, hook: Path) -> None:
    """RELEASE frees the lease at once, and the client gets the same address the next time."""
    async with serving(lab) as server:
        async with running(lab, udhcpc(hook, "-R")):
            bound = await server.until(EventKind.BOUND)
            await trio.sleep(0.3)  # the hook sets the address, without which udhcpc can't send a RELEASE
        released = await server.until(EventKind.RELEASED)
        assert released.binding.ip == bound.binding.ip
        await run(lab, udhcpc(hook, "-q"))
    assert told(lab, "bound")["ip"] == str(bound.binding.address)


async def test_udhcpc_renews_by_unicast(lab: Lab, hook: Path) -> None:
    """A client that has the address renews it without DISCOVER and gets the ACK where it lives."""
    async with serving(lab) as server:
        async with running(lab, udhcpc(hook)) as client:
            bound = await server.until(EventKind.BOUND)
            await trio.sleep(0.5)  # the hook sets the address
            client.send_signal(signal.SIGUSR1)  # renew now
            renewed = await server.until(EventKind.RENEWED)
            await trio.sleep(0.5)
        assert told(lab, "renew")["ip"] == str(bound.binding.address)
        assert server.service.counters["discover"] == 1
    assert renewed.binding.ip == bound.binding.ip
    assert renewed.binding.expires > bound.binding.expires


async def test_dhclient_binds_reboots_and_releases(lab: Lab, hook: Path) -> None:
    """dhclient's second start asks for its old address without DISCOVER (INIT-REBOOT) and is answered."""
    async with serving(lab) as server:
        try:
            await run(lab, dhclient(lab, hook, "-1"))
            first = await server.until(EventKind.BOUND)
            await run(lab, [*dhclient(lab, hook, "-x")])
            discovers = server.service.counters["discover"]
            await run(lab, dhclient(lab, hook, "-1"))
            renewed = await server.until(EventKind.RENEWED)
            assert renewed.binding.ip == first.binding.ip
            assert server.service.counters["discover"] == discovers
        finally:
            await run(lab, dhclient(lab, hook, "-r"))
        assert (await server.until(EventKind.RELEASED)).binding.ip == first.binding.ip


async def test_dhclient_is_refused_an_address_of_another_network(lab: Lab, hook: Path) -> None:
    """INIT-REBOOT with an address from another network gets a NAK, and then a lease that fits."""
    lease = (
        'lease {{ interface "c0"; fixed-address 192.168.55.9; option subnet-mask 255.255.255.0; '
        "option dhcp-server-identifier 192.168.55.1; option dhcp-lease-time 86400; "
        "renew {0}; rebind {0}; expire {0}; }}\n"
    ).format("6 2099/01/01 00:00:00")
    argv = dhclient(lab, hook, "-1")
    (lab.directory / "dhclient.leases").write_text(lease)
    async with serving(lab) as server:
        try:
            assert "DHCPNAK" in await run(lab, argv)
            bound = await server.until(EventKind.BOUND)
        finally:
            await run(lab, dhclient(lab, hook, "-x"))
    assert bound.binding.address in lab.address.network


async def test_dhcpcd_gets_an_address_after_its_own_probes(lab: Lab) -> None:
    """dhcpcd, which probes by ARP before it uses an address, ends up with it and the route."""
    script = (
        "mount -t tmpfs t /var/lib/dhcpcd; mkdir -p /run/dhcpcd; mount -t tmpfs t /run/dhcpcd; "
        "exec dhcpcd -4 -1 -B -d -t 20 -f /dev/null -c /bin/true --noipv4ll --nohook '*' c0"
    )
    async with serving(lab) as server:
        text = await run(lab, ["sh", "-c", script], mount_namespace=True)
        bound = await server.until(EventKind.BOUND)
    assert f"leased {bound.binding.address}" in text
    assert "adding default route via 10.77.0.1" in text


async def test_leases_survive_a_restart_of_the_server(lab: Lab, hook: Path) -> None:
    """A new server process knows the lease: the client's renewal is an ACK with the same address, no NAK."""
    async with serving(lab) as server:
        await run(lab, udhcpc(hook, "-q"))
        first = await server.until(EventKind.BOUND)
    async with serving(lab) as server:
        assert [one.ip for one in server.service.leases()] == [first.binding.ip]
        await run(lab, udhcpc(hook, "-q", "-r", str(first.binding.address)))
        again = await server.until(EventKind.RENEWED)
    assert again.binding.ip == first.binding.ip


async def test_a_reservation_made_live_wins(lab: Lab, hook: Path) -> None:
    """A reservation added while the server runs moves the client to its reserved address."""
    mac = lab.client_mac()
    async with serving(lab) as server:
        await run(lab, udhcpc(hook, "-q"))
        server.service.reserve(mac, IPv4Address("10.77.9.9"), host_name="fixed")
        await run(lab, udhcpc(hook, "-q", "-O", "hostname"))
        assert told(lab, "bound")["ip"] == "10.77.9.9"
        assert told(lab, "bound")["hostname"] == "fixed"
        active = [str(one.address) for one in server.service.leases() if one.state is BindingState.BOUND]
    assert active == ["10.77.9.9"]


async def test_networkd_gets_its_lease(lab: Lab) -> None:
    """systemd-networkd, with an RFC 4361 client identifier: address, route and lease as we gave them."""
    # A read-only /sys keeps it from waiting for udev.
    script = (
        "mount -t tmpfs tmpfs /run; mkdir -p /run/systemd/network /run/systemd/netif/links\n"
        "chown -R systemd-network: /run/systemd/netif; mount -o remount,ro,bind /sys\n"
        "printf '[Match]\\nName=c0\\n[Network]\\nDHCP=ipv4\\n' >/run/systemd/network/c0.network\n"
        "exec env SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console /lib/systemd/systemd-networkd\n"
    )
    async with (
        serving(lab) as server,
        peers.running(lab.in_client(["sh", "-c", script], mount_namespace=True)) as networkd,
    ):
        lease = (await server.until(EventKind.BOUND)).binding
        await networkd.said(
            f"c0: DHCPv4 address {lease.address}/16, gateway 10.77.0.1 acquired from 10.77.0.1"
        )
        await networkd.said("DHCPv4 address and routes set")
    assert lease.client_id is not None
    assert lease.client_id[0] == 255  # RFC 4361, 6.1

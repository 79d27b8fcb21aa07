"""Our DNS on a real bridge: dig as the judge, a flood from one port, and the host's resolver behind it."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import IPv4Address

import pytest
import trio

from net.dns.service import DnsError, DnsService, serve_dns
from net.dns.zone import Zone
from tests.integration.net.lab import Lab
from tests.integration.net.peers import running
from tests.integration.net.serving import run

pytestmark = pytest.mark.root


@asynccontextmanager
async def names(lab: Lab, link: str, resolver: IPv4Address | None = None) -> AsyncIterator[DnsService]:
    """The zone guest.rayos at the lab's server, with web = 10.77.1.9."""
    zone = Zone("guest.rayos", lab.address.network, lab.address.ip)
    assert zone.put(int(IPv4Address("10.77.1.9")), "web")
    async with trio.open_nursery() as nursery:
        yield await nursery.start(partial(serve_dns, link, zone, lab.address.ip, resolver=resolver))
        nursery.cancel_scope.cancel()


def dig(*words: str) -> list[str]:
    """dig at our server: what the answer says, or its status."""
    return ["dig", "@10.77.0.1", "+tries=3", "+time=2", "+nocmd", "+nostats", *words]


async def test_dig_asks_from_a_port_from_a_plain_link_and_from_the_host(lab: Lab) -> None:
    """One client on the link itself, then both on a bridge, and a process of the host: all get the answers."""
    lab.run(["ip", "address", "add", "10.77.0.2/16", "dev", "c0"])
    async with names(lab, lab.server_link):
        assert await run(lab, dig("web.guest.rayos", "+short")) == "10.77.1.9\n"
    with lab.host_with_address("10.77.0.3"):
        async with names(lab, "br0") as dns:
            assert await run(lab, dig("-x", "10.77.1.9", "+short")) == "web.guest.rayos.\n"
            assert "status: NXDOMAIN" in await run(lab, dig("none.guest.rayos"))
            assert "status: REFUSED" in await run(lab, dig("example.org"))
            host = await trio.run_process(
                lab.in_server(dig("web.guest.rayos", "+short")), capture_stdout=True
            )
            assert host.stdout == b"10.77.1.9\n"
            assert dns.counters == {"answered": 3, "refused": 1}


async def test_a_flood_from_one_port_leaves_the_others_their_names(lab: Lab) -> None:
    """One guest asks without end, from ever new addresses: the rest of what it sends is thrown away."""
    lab.run(["ip", "address", "add", "10.77.0.2/16", "dev", "c0"])
    flood = (
        "import itertools, sys; from net.dhcp import frame, packet_socket\n"
        "sock = packet_socket.open_sender(sys.argv[1]); print('up', flush=True)\n"
        "query = bytes.fromhex('000101000001000000000000') + b'\\3web\\5guest\\5rayos\\0\\0\\1\\0\\1'\n"
        "for n in itertools.count():\n"
        "    mac = b'\\2\\x4c' + n.to_bytes(4, 'big')\n"
        "    try: sock.send(frame.udp_frame(mac, b'\\xff' * 6, 0x0A4D0500, 0x0A4D0001, 9, 53, query))\n"
        "    except OSError: pass\n"
    )
    with lab.host_with_address("10.77.0.3") as third:
        async with names(lab, "br0") as dns:
            argv = ["nsenter", f"--net=/run/netns/{third}", sys.executable, "-c", flood, "h1"]
            async with running(argv) as storm:
                await storm.said("up")
                for _ in range(5):
                    assert await run(lab, dig("web.guest.rayos", "+short")) == "10.77.1.9\n"
            assert dns.counters["answered"] >= 5
            assert dns.counters["rate_limited"] > 100


async def test_other_names_are_asked_of_the_resolver(lab: Lab) -> None:
    """With a resolver dig gets its answer under its own question; without one that answers, SERVFAIL in time."""
    lab.run(["ip", "address", "add", "10.77.0.2/16", "dev", "c0"])
    zone = ["--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]
    zone += ["--listen-address=127.0.0.1", "--bind-interfaces", "--host-record=example.org,192.0.2.7"]
    async with names(lab, lab.server_link, IPv4Address("127.0.0.1")) as dns:
        assert "status: SERVFAIL" in await run(lab, dig("example.org"))
        async with running(lab.in_server(["dnsmasq", *zone])) as peer:
            await peer.said("started")
            assert await run(lab, dig("example.org", "+short")) == "192.0.2.7\n"
        assert dns.counters["resolved"] >= 1
        assert dns._asking == {}


async def test_a_taken_port_is_said(lab: Lab) -> None:
    """Another DNS server on our address: one sentence that names it."""
    async with names(lab, lab.server_link):
        with pytest.RaisesGroup(pytest.RaisesExc(DnsError, match="another server has port 53 of 10.77.0.1")):
            async with names(lab, lab.server_link):
                pytest.fail("two servers on one port")

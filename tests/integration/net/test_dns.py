"""Our DNS on a real bridge: dig as the judge, a flood from one port, and the host's resolver behind it."""

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from ipaddress import IPv4Address

import pytest
import trio
from dnslib import DNSRecord  # type: ignore[import-untyped]

from rayos_net.dns import stream
from rayos_net.dns.service import DnsError, DnsService, serve_dns
from rayos_net.dns.zone import Zone
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
        "import itertools, sys; from rayos_net.dhcp import frame, packet_socket\n"
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


async def test_dig_asks_over_tcp(lab: Lab) -> None:
    """dig asks from the link and from the host, several questions on one connection. A long answer of the resolver is
    cut short over UDP, so that dig comes again over TCP and has it whole.
    """
    lab.run(["ip", "address", "add", "10.77.0.2/16", "dev", "c0"])
    text = ",".join(letter * 250 for letter in "abcdefgh")
    peer = ["dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]
    peer += ["--listen-address=127.0.0.1", "--bind-interfaces", f"--txt-record=long.example.org,{text}"]
    async with names(lab, lab.server_link, IPv4Address("127.0.0.1")) as dns:
        both = ["web.guest.rayos", "+short", "-x", "10.77.1.9", "+short"]
        assert await run(lab, dig("+tcp", "+keepopen", *both)) == "10.77.1.9\nweb.guest.rayos.\n"
        host = await trio.run_process(
            lab.in_server(dig("+tcp", "web.guest.rayos", "+short")), capture_stdout=True
        )
        assert host.stdout == b"10.77.1.9\n"
        assert "status: SERVFAIL" in await run(lab, dig("+tcp", "example.org"))
        async with running(lab.in_server(peer)) as resolver:
            await resolver.said("started")
            told = await run(lab, dig("long.example.org", "TXT"))
            assert "Truncated, retrying in TCP mode" in told and all(
                letter * 250 in told for letter in "abcdefgh"
            )
        assert dns._asking == {} and "malformed" not in dns.counters


async def test_one_client_over_tcp_leaves_the_others_their_names(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many connections, silence, half a question, nonsense, answers that nobody reads: closed, and nobody waits."""
    monkeypatch.setattr(stream, "IDLE_SECONDS", 0.3)
    lab.run(["ip", "address", "add", "10.77.0.2/16", "dev", "c0"])
    lab.run(["ip", "address", "add", "10.77.0.9/16", "dev", "c0"])
    question = bytes(DNSRecord.question("web.guest.rayos").pack())
    whole = len(question).to_bytes(2, "big") + question

    def connect() -> trio.SocketStream:
        with lab.entered():
            made = socket.create_connection(("10.77.0.1", 53), source_address=("10.77.0.9", 0))
        return trio.SocketStream(trio.socket.from_stdlib_socket(stack.enter_context(made)))

    async def is_closed(one: trio.SocketStream) -> bool:
        try:
            while await one.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        return True

    async with names(lab, lab.server_link) as dns:
        with trio.fail_after(20), ExitStack() as stack:
            many = [connect() for _ in range(stream.CONNECTIONS_PER_CLIENT + 1)]
            assert await is_closed(many[-1]) and dns.counters["streams_refused"] == 1
            assert (
                await run(lab, dig("+tcp", "-b", "10.77.0.2", "web.guest.rayos", "+short")) == "10.77.1.9\n"
            )
            assert all([await is_closed(one) for one in many])  # silent
            for bad in (whole[:-3], b"\0\4none", b"\xff\xff" + bytes(100)):
                one = connect()
                await one.send_all(bad)
                assert await is_closed(one)
            # Two in pieces, with an end behind them: both are answered before ours.
            one = connect()
            for piece in (whole[:1], whole[1:9], whole[9:] + whole):
                await one.send_all(piece)
                await trio.sleep(0.01)
            await one.send_eof()
            data = b"".join([chunk async for chunk in one])
            size = 2 + int.from_bytes(data[:2], "big")
            assert data == data[:size] * 2
            assert str(DNSRecord.parse(data[2:size]).short()) == "10.77.1.9"
            # When all places are taken the longest quiet one gives way.
            with monkeypatch.context() as fewer:
                fewer.setattr(stream, "CONNECTIONS_MAX", 2)
                one, two = connect(), connect()
                await two.send_all(whole)
                assert await two.receive_some()
                assert (
                    await run(lab, dig("+tcp", "-b", "10.77.0.2", "web.guest.rayos", "+short"))
                    == "10.77.1.9\n"
                )
                assert dns.counters["streams_displaced"] == 1 and await is_closed(one)
            # One that asks and never reads waits in its own buffers; it asks no faster than it may.
            deaf = connect()
            with trio.move_on_after(0.5), suppress(trio.BrokenResourceError):
                while True:
                    await deaf.send_all(whole * 100)
            assert dns.counters.get("rate_limited"), dns.counters
            assert (
                await run(lab, dig("+tcp", "-b", "10.77.0.2", "web.guest.rayos", "+short")) == "10.77.1.9\n"
            )


async def test_a_taken_port_is_said(lab: Lab) -> None:
    """Another DNS server on our address: one sentence that names it."""
    async with names(lab, lab.server_link):
        with pytest.RaisesGroup(pytest.RaisesExc(DnsError, match="another server has port 53 of 10.77.0.1")):
            async with names(lab, lab.server_link):
                pytest.fail("two servers on one port")

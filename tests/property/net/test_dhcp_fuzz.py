"""Whatever arrives on port 67, the server raises nothing, its memory is bounded, and it never gives an
address twice.
"""

import os
import random
import time
from pathlib import Path
from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_net.dhcp import frame
from rayos_net.dhcp import message as wire
from rayos_net.dhcp.binding import ACTIVE
from rayos_net.dhcp.config import Limits
from rayos_net.dhcp.message import BadMessage, MessageType
from rayos_net.dhcp.server import Server
from rayos_net.dhcp.server_action import Source
from tests.unit.net.dhcp_driver import NOW, SERVER, Driver, packed, request, subnet

CORPUS: Final = Path(__file__).with_name("dhcp_corpus")
PACKETS: Final = int(os.environ.get("RAYOS_FUZZ_PACKETS", "100000"))  # `make soak`: a million


def seeds() -> list[bytes]:
    """The corpus: one line of hexadecimal for each message."""
    return [bytes.fromhex(line) for file in sorted(CORPUS.glob("*.hex")) for line in file.read_text().split()]


def check(server: Server) -> None:
    """Checks the invariants that hold at any time."""
    pool = server.pools[0]
    active = [one for one in pool.by_ip.values() if one.state in ACTIVE]
    assert len({one.client for one in active}) == len(active)
    assert len(pool.by_ip) <= 256
    assert len(pool.by_client) <= len(pool.by_ip)
    assert len(server._probing) <= 256
    assert len(pool._expiry) <= 64 + 4 * 256 + 1


def test_the_corpus_is_answered_without_an_exception() -> None:
    """Findings of earlier fuzzing and one message for each row of the hostile list stay fixed."""
    assert len(seeds()) >= 20
    driver = Driver(subnet(probe_seconds=0.1))
    for data in seeds():
        driver.perform(driver.server.receive(data, Source("ray-a-0"), driver.now))
        driver.wait(0.05)
        check(driver.server)


def test_mutated_messages_never_raise_and_break_no_invariant() -> None:
    """A bounded random run; the seed is printed on failure."""
    seed = time.time_ns()
    random_ = random.Random(seed)
    corpus = seeds()
    driver = Driver(subnet(probe_seconds=0.1, limits=Limits(requests_per_second=None, leases_per_port=8)))
    done = 0
    try:
        while done < PACKETS:
            for _ in range(200):
                data = mutate(random_, random_.choice(corpus))
                source = Source(random_.choice(("a", "b", "c")), random_.random() < 0.2)
                driver.perform(driver.server.receive(data, source, driver.now))
                if random_.random() < 0.05:
                    driver.perform(driver.server.conflict(random_.getrandbits(32), b"\2" * 6, driver.now))
                    driver.wait(random_.choice((0.05, 1, 700, 4000)))
            done += 200
            check(driver.server)
    except BaseException:
        print(f"seed {seed}, about message {done}")
        raise
    assert driver.server.counters["ack"] > 0


def mutate(random_: random.Random, data: bytes) -> bytes:
    """A few changes: bytes, lengths, options put in, cuts, growth."""
    out = bytearray(data)
    for _ in range(random_.randrange(4)):
        at = random_.randrange(len(out)) if out else 0
        match random_.randrange(7):
            case 0 if out:
                out[at] = random_.randrange(256)
            case 1:
                del out[at : at + random_.randrange(1, 9)]
            case 2:
                out[at:at] = random_.randbytes(random_.randrange(1, 30))
            case 3 if len(out) > 240:
                value = random_.randbytes(random_.choice((0, 1, 2, 4, 4, 4, 7, 255)))
                out[240:240] = (
                    bytes((random_.choice((12, 50, 51, 52, 53, 54, 55, 57, 61, 81, 82, 93)), len(value)))
                    + value
                )
            case 4 if len(out) > 243:
                out[242] = random_.randrange(1, 9)
            case 5 if len(out) > 240:
                out[240:240] = bytes((50, 4, 10, 5, 0, random_.randrange(256)))
            case 6 if len(out) > 34:
                out[12:16] = bytes((10, 5, 0, random_.randrange(256)))
    return bytes(out)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=600))
def test_decode_refuses_or_round_trips(tail: bytes) -> None:
    """Any option area either is BadMessage or reads back equal after encoding."""
    data = request(MessageType.DISCOVER).encode()[: wire.HEADER_SIZE] + tail
    try:
        seen = wire.decode(data)
    except BadMessage:
        return
    again = wire.decode(seen.encode(4096))
    assert again.options == seen.options


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 12),
            st.sampled_from(["bind", "discover", "renew", "release", "decline", "wait", "wrong"]),
        ),
        max_size=40,
    )
)
def test_no_address_is_leased_twice_whatever_the_order(steps: list[tuple[int, str]]) -> None:
    """Any interleaving of clients: every ACK names an address that no other client holds at that time."""
    driver = Driver()
    held: dict[int, tuple[int, float]] = {}
    for client, step in steps:
        mine = next((ip for ip, (who, until) in held.items() if who == client and until > driver.now), 0)
        reply = None
        match step:
            case "bind":
                offer = driver.send(request(MessageType.DISCOVER, client))
                if offer is not None:
                    chosen = {50: offer.yiaddr.to_bytes(4, "big"), 54: SERVER.packed}
                    reply = driver.send(request(MessageType.REQUEST, client, options=chosen))
            case "discover":
                driver.send(request(MessageType.DISCOVER, client))
            case "renew":
                reply = driver.send(request(MessageType.REQUEST, client, ciaddr=mine))
            case "wrong":
                reply = driver.send(request(MessageType.REQUEST, client, options={50: packed("10.5.0.12")}))
            case "release":
                driver.send(request(MessageType.RELEASE, client, ciaddr=mine))
                held.pop(mine, None)
            case "decline":
                driver.send(request(MessageType.DECLINE, client, options={50: mine.to_bytes(4, "big")}))
                held.pop(mine, None)
            case "wait":
                driver.wait(1801)
        if reply is not None and reply.type == MessageType.ACK:
            owner = held.get(reply.yiaddr)
            assert owner is None or owner[0] == client or owner[1] <= driver.now
            held[reply.yiaddr] = (client, driver.now + 3600)
        check(driver.server)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120))
def test_frame_parsers_read_nothing_outside(data: bytes) -> None:
    """Any bytes give None or a datagram that lies inside the frame."""
    for candidate in (data, bytes(12) + b"\x08\x00" + data, bytes(12) + b"\x08\x06" + data):
        seen = frame.datagram(candidate, 67)
        assert seen is None or seen.payload in candidate
        frame.arp(candidate)


def test_frames_read_back_and_scapy_agrees_with_the_checksum() -> None:
    """Our own reply frame: scapy finds the addresses and a correct IP header checksum."""
    from scapy.layers.inet import IP, UDP  # type: ignore[import-untyped,unused-ignore]
    from scapy.layers.l2 import ARP, Ether  # type: ignore[import-untyped,unused-ignore]

    data = frame.udp_frame(b"\2" * 6, b"\4" * 6, 0x0A050001, 0x0A0500FE, 67, 68, b"x" * 301)
    seen = Ether(data)
    assert (seen.src, seen.dst, seen[IP].src, seen[IP].dst) == (
        "02:" * 5 + "02",
        "04:" * 5 + "04",
        "10.5.0.1",
        "10.5.0.254",
    )
    stated = seen[IP].chksum
    del seen[IP].chksum
    assert IP(bytes(seen[IP])).chksum == stated
    assert bytes(seen[UDP].payload) == b"x" * 301
    assert frame.datagram(data, 68) == (b"\2" * 6, 0x0A050001, 0x0A0500FE, 67, b"x" * 301)
    probe = Ether(frame.arp_frame(b"\2" * 6, 0, 0x0A0500FE))[ARP]
    assert (probe.op, probe.psrc, probe.pdst, probe.hwdst) == (
        1,
        "0.0.0.0",
        "10.5.0.254",
        "00:00:00:00:00:00",
    )


def test_now_is_the_only_clock() -> None:
    """The core takes its time as an argument: a lease of an hour expires in a test at once."""
    driver = Driver()
    driver.bind()
    assert driver.server.deadline() == NOW + 3600

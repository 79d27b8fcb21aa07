"""Frames that try to get past a guest's firewall and spoof guard, through the device (row N5 of the threat model)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import reduce
from ipaddress import IPv4Address
from operator import truediv
from typing import Any, Final

import pytest
from scapy.layers.inet import IP, TCP, UDP, IPOption_LSRR, IPOption_SSRR  # type: ignore[import-untyped,unused-ignore]
from scapy.layers.inet6 import (  # type: ignore[import-untyped,unused-ignore]
    ICMPv6ND_NA,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q  # type: ignore[import-untyped,unused-ignore]

from rayos_devices.net.backend import RX, TX, NetBackend
from rayos_devices.net.wire import HEADER_BYTES
from rayos_net.firewall.verdict import reason_name
from rayos_net.packet import Fault
from rayos_vmm.shared.spec import Firewall
from rayos_vmm.worker.firewall import PortFirewall, Settings
from tests.framework.controlled import RealNet, TapWire, other_side, tapped_card
from tests.framework.kept import Kept
from tests.framework.target import Rig, Stepped, Threaded
from tests.framework.wire import Wire
from tests.unit.net.frames import (
    GATEWAY,
    GUEST,
    GUEST6,
    GUEST_MAC,
    OTHER_MAC,
    arp,
    ether,
    ping,
    tcp,
    udp,
    udp6,
)
from tests.unit.net.test_firewall import dhcp

HEADER: Final = bytes(HEADER_BYTES)
OUTSIDE: Final = "93.184.216.34"
RULES: Final[list[dict[str, Any]]] = [
    {
        "name": "no-smtp",
        "action": "deny",
        "direction": "out",
        "protocol": "tcp",
        "ports": [25],
        "priority": 1,
    },
    {"name": "ssh", "action": "allow", "direction": "in", "protocol": "tcp", "ports": [22]},
]


def firewall() -> PortFirewall:
    return PortFirewall(
        bytes.fromhex(GUEST_MAC.replace(":", "")),
        server=int(IPv4Address(GATEWAY)),
        fixed=[int(IPv4Address(GUEST))],
        settings=Settings(rules=RULES),
    )


Target = Stepped[NetBackend] | RealNet


@pytest.fixture(scope="module")
def tap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kept, TapWire]]:
    """A sandboxed worker with a guarded card, and the other side of its tap, for all cases."""
    firewall = Firewall(mac=GUEST_MAC, server=GATEWAY, addresses=(GUEST,), rules=RULES)
    with tapped_card(tmp_path_factory.mktemp("net"), firewall) as card:
        yield card


@pytest.fixture(params=["stepped", "served"])
def net(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A card in this process, or the real worker's."""
    if request.param == "served":
        with RealNet(request.getfixturevalue("tap")[0]) as real:
            yield real
        return
    with Stepped(lambda loop: NetBackend("net", loop, Wire(), judge=firewall())) as target:
        yield target


@pytest.fixture
def wire(request: pytest.FixtureRequest, net: Target) -> Wire | TapWire:
    """The card's other side."""
    return other_side(net, request)


@pytest.fixture
def rig(net: Target) -> Iterator[Rig]:
    with Rig(net, 2) as rig:
        yield rig


def reasons(net: Target) -> dict[str, int]:
    found = net.backend.snapshot()["firewall"]["reasons"]
    assert isinstance(found, dict)
    return found


def send(rig: Rig, frame: bytes) -> None:
    rig.ram.rewind(rig.heap)
    rig.queues[TX].submit([(rig.ram.put(HEADER + frame), HEADER_BYTES + len(frame))])
    rig.wait_used(TX)


def changed(frame: bytes, at: int, *values: int) -> bytes:
    return frame[:at] + bytes(values) + frame[at + len(values) :]


SMTP = tcp(GUEST, 4000, OUTSIDE, 25)
BIG = udp(GUEST, 1, OUTSIDE, 9, bytes(2000)).fragment(1000)
V6 = IPv6(src=GUEST6, dst="fe80::2")
MANY = reduce(truediv, [*(IPv6ExtHdrDestOpt() for _ in range(9)), TCP(dport=25)])

MALFORMED: Final = frozenset(reason_name(fault) for fault in Fault if fault.is_malformed)
#: What a guest sends, and the reason by which it is refused.
OUTGOING: Final = {
    "vlan": (ether(Dot1Q(vlan=1) / SMTP), "vlan"),
    "vlan 0": (ether(Dot1Q(vlan=0) / tcp(GUEST, 1, OUTSIDE, 80)), "vlan"),
    "qinq": (ether(Dot1AD(vlan=1) / Dot1Q(vlan=2) / SMTP), "vlan"),
    "old qinq": (changed(ether(Dot1Q(vlan=1) / SMTP), 12, 0x91, 0x00), "vlan"),
    "another type": (ether(b"x" * 50, type=0x88CC), "ethertype"),
    "802.3 length": (ether(b"\xaa\xaa\3\0\0\0\x08\0" + bytes(SMTP), type=0x40), "ethertype"),
    "loose source route": (
        ether(IP(src=GUEST, dst=OUTSIDE, options=[IPOption_LSRR(routers=["1.2.3.4"])]) / TCP(dport=80)),
        "source_route",
    ),
    "strict source route": (
        ether(IP(src=GUEST, dst=OUTSIDE, options=[IPOption_SSRR(routers=["1.2.3.4"])]) / TCP(dport=80)),
        "source_route",
    ),
    "option without an end": (
        ether(IP(src=GUEST, dst=OUTSIDE, options=[b"\x44\xff\0\0"]) / TCP(dport=80)),
        "source_route",
    ),
    "options before the ports": (
        ether(IP(src=GUEST, dst=OUTSIDE, options=[b"\1\1\1\0"]) / TCP(sport=80, dport=25)),
        "rule",
    ),
    "header of 4 words": (changed(ether(SMTP), 14, 0x44), "ipv4"),
    "header behind the end": (changed(ether(SMTP), 14, 0x4F), "ipv4"),
    "version 6 in an IPv4 frame": (changed(ether(SMTP), 14, 0x65), "ipv4"),
    "longer than the frame": (changed(ether(SMTP), 16, 0xFF, 0xFF), "ipv4"),
    "shorter than its header": (changed(ether(SMTP), 16, 0, 19), "ipv4"),
    "first fragment without ports": (
        ether(IP(src=GUEST, dst=OUTSIDE, flags="MF", proto=6) / bytes(8)),
        "fragment",
    ),
    "fragment over the header": (ether(IP(src=GUEST, dst=OUTSIDE, frag=1, proto=6) / bytes(40)), "fragment"),
    "fragment without a first": (ether(BIG[1]), "fragment_without_first"),
    "fragment past 64 KiB": (ether(IP(src=GUEST, dst=OUTSIDE, frag=8189, proto=17) / bytes(100)), "fragment"),
    "first fragment of what is denied": (ether((SMTP / bytes(2000)).fragment(1000)[0]), "rule"),
    "tcp header short": (ether(IP(src=GUEST, dst=OUTSIDE) / TCP(dport=80, dataofs=4)), "transport"),
    "tcp header long": (ether(IP(src=GUEST, dst=OUTSIDE) / TCP(dport=80, dataofs=15)), "transport"),
    "udp longer than its packet": (ether(IP(src=GUEST, dst=OUTSIDE) / UDP(dport=9, len=500)), "transport"),
    "denied": (ether(SMTP), "rule"),
    "routing header 0": (
        ether(V6 / IPv6ExtHdrRouting(type=0, addresses=["fe80::9"]) / UDP()),
        "source_route",
    ),
    "too many extension headers": (ether(V6 / MANY), "extension"),
    "hop by hop in the middle": (
        ether(V6 / IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop() / TCP(dport=25)),
        "extension",
    ),
    "tcp behind an extension": (ether(V6 / IPv6ExtHdrDestOpt() / TCP(sport=9, dport=25)), "rule"),
    "two fragment headers": (
        ether(V6 / IPv6ExtHdrFragment(m=1, id=1) / IPv6ExtHdrFragment(m=1, id=2) / UDP() / bytes(32)),
        "extension",
    ),
    "arp of 8-byte addresses": (changed(arp(GUEST, GATEWAY), 18, 8), "arp"),
    "arp for IPv6": (changed(arp(GUEST, GATEWAY), 16, 0x86, 0xDD), "arp"),
    "arp cut short": (arp(GUEST, GATEWAY)[:40], "short"),
    "reverse arp": (arp(GUEST, GATEWAY, operation=3), "arp"),
    "arp in the gateway's name": (arp(GATEWAY, GUEST, operation=2), "arp_sender"),
    "arp with another's card": (arp(GUEST, GATEWAY, mac=OTHER_MAC), "arp_sender"),
    "another's card": (ether(tcp(GUEST, 1, OUTSIDE, 80), source=OTHER_MAC), "source_mac"),
    "another's address": (ether(tcp("10.5.0.11", 1, OUTSIDE, 80)), "source_address"),
    "no address": (ether(udp("0.0.0.0", 1, OUTSIDE, 9)), "source_address"),
    "another's IPv6 address": (ether(udp6("fe80::1", 1, "ff02::fb", 5353)), "source_address"),
    "dhcp server": (ether(udp(GUEST, 67, GUEST, 68)), "dhcp_server"),
    "dhcp for another card": (dhcp("discover", mac=b"\2" * 6), "dhcp_client"),
    "dhcp in fragments": (
        ether(udp("0.0.0.0", 68, "255.255.255.255", 67, bytes(600)).fragment(400)[0]),
        "dhcp_client",
    ),
    "router advertisement": (ether(IPv6(src=GUEST6, dst="ff02::1") / ICMPv6ND_RA()), "router"),
    "redirect": (ether(IPv6(src=GUEST6, dst="ff02::1") / ICMPv6ND_Redirect()), "router"),
    "neighbour's name": (ether(IPv6(src=GUEST6, dst="ff02::1") / ICMPv6ND_NA(tgt="fe80::1")), "neighbour"),
    "to the bridge": (ether(tcp(GUEST, 1, OUTSIDE, 80), destination="01:80:c2:00:00:00"), "reserved_mac"),
}


@pytest.mark.parametrize("name", OUTGOING)
def test_N5_what_would_slip_past_the_rules_is_dropped(
    net: Target, rig: Rig, wire: Wire | TapWire, name: str
) -> None:
    """Counted as the firewall's, or as invalid where no network would take it, and by its reason; the next passes."""
    frame, reason = OUTGOING[name]
    send(rig, frame)
    assert wire.sent == []
    assert net.backend.snapshot()["denials"] == {"invalid" if reason in MALFORMED else "firewall": 1}
    assert reasons(net) == {reason: 1}
    honest = ether(tcp(GUEST, 1, OUTSIDE, 80))
    send(rig, honest)
    assert wire.sent == [HEADER + honest]


def test_N5_fragments_go_the_way_of_their_first(net: Target, rig: Rig, wire: Wire | TapWire) -> None:
    """All of an allowed datagram, none of a denied one, none of one whose first came from nowhere."""
    for piece in BIG:
        send(rig, ether(piece))
    assert len(wire.sent) == len(BIG)
    wire.sent.clear()
    for piece in (SMTP / bytes(2000)).fragment(1000):
        send(rig, ether(piece))
    assert wire.sent == []


INCOMING: Final = {
    "not for it": ether(tcp(OUTSIDE, 1, GUEST, 22), source=OTHER_MAC, destination="52:59:00:00:00:09"),
    "denied": ether(tcp(OUTSIDE, 1, GUEST, 23), source=OTHER_MAC, destination=GUEST_MAC),
    "vlan": ether(Dot1Q(vlan=1) / tcp(OUTSIDE, 1, GUEST, 22), source=OTHER_MAC, destination=GUEST_MAC),
    "another's dhcp": ether(udp("10.5.0.66", 67, GUEST, 68), source=OTHER_MAC, destination=GUEST_MAC),
    "reply to nothing": ether(ping(OUTSIDE, GUEST, kind=0), source=OTHER_MAC, destination=GUEST_MAC),
    "broken": ether(tcp(OUTSIDE, 1, GUEST, 22), source=OTHER_MAC, destination=GUEST_MAC)[:40],
}


@pytest.mark.parametrize("name", INCOMING)
def test_N5_what_is_not_let_in_never_is_in_guest_memory(
    net: Target, rig: Rig, wire: Wire | TapWire, name: str
) -> None:
    at = rig.ram.put(b"\xee" * 2048)
    rig.queues[RX].submit((), [(at, 2048)])
    wire.arrive(HEADER + INCOMING[name])
    rig.settle()
    assert rig.ram.read(at, 2048) == b"\xee" * 2048
    assert net.backend.snapshot()["denials"] == {"invalid" if name == "broken" else "firewall": 1}
    admitted = ether(tcp(OUTSIDE, 1, GUEST, 22), source=OTHER_MAC, destination=GUEST_MAC)
    wire.arrive(HEADER + admitted)
    ((_, written),) = rig.wait_used(RX)
    assert rig.ram.read(at, written)[HEADER_BYTES:] == admitted


def test_N5_a_frame_rewritten_while_it_is_checked() -> None:
    """A second thread turns the destination port over and over: nothing that leaves was ever denied."""
    wire = Wire()
    with (
        Threaded(lambda loop: NetBackend("net", loop, wire, judge=firewall())) as target,
        Rig(target, 2) as rig,
    ):
        frame = ether(tcp(GUEST, 1, OUTSIDE, 80, data=bytes(400)))
        at = rig.ram.put(HEADER + frame)
        is_over = threading.Event()

        def rewrite() -> None:
            while not is_over.is_set():
                rig.ram.write(at + HEADER_BYTES + 36, b"\0\x19")
                rig.ram.write(at + HEADER_BYTES + 36, b"\0\x50")

        writer = threading.Thread(target=rewrite)
        writer.start()
        try:
            for _ in range(300):
                rig.queues[TX].submit([(at, HEADER_BYTES + len(frame))])
                rig.wait_used(TX)
        finally:
            is_over.set()
            writer.join()
        assert {sent[HEADER_BYTES + 36 : HEADER_BYTES + 38] for sent in wire.sent} <= {b"\0\x50"}
        refused = target.backend.snapshot()["denials"].get("firewall", 0)
        assert len(wire.sent) + refused == 300 and wire.sent


def test_no_frame_finds_a_gap_between_two_tables() -> None:
    """Tables are exchanged hundreds of times under a stream of frames. A frame that both refuse never leaves, one
    that both allow always does, and any other goes by one of the two.
    """
    many = [
        {"name": f"no-{port}", "action": "deny", "direction": "out", "protocol": "tcp", "ports": [port]}
        for port in range(2000, 2300)
    ]
    turns: list[list[dict[str, Any]]] = [
        [
            RULES[0],
            *many,
            {"name": "now", "action": "deny", "direction": "out", "protocol": "tcp", "ports": [port]},
        ]
        for port in (1000, 1001)
    ]
    wire, judge, rounds = Wire(), firewall(), 300
    with (
        Threaded(lambda loop: NetBackend("net", loop, wire, judge=judge)) as target,
        Rig(target, 2) as rig,
    ):
        is_over = threading.Event()

        def exchange() -> None:
            try:
                for number in range(1, rounds + 1):
                    rules = [*turns[number % 2], {**RULES[1], "ports": [number]}]  # something new each time
                    target.call(lambda: judge.apply(Settings(revision=number, rules=rules)))  # noqa: B023
            finally:
                is_over.set()

        target.call(lambda: judge.apply(Settings(rules=turns[0])))
        frames = {
            port: ether(tcp(GUEST, 1, OUTSIDE, port, data=bytes(20))) for port in (25, 80, 1000, 1001, 2150)
        }
        at = {port: rig.ram.put(HEADER + frame) for port, frame in frames.items()}
        exchanger = threading.Thread(target=exchange)
        exchanger.start()
        sent = dict.fromkeys(frames, 0)
        while not is_over.is_set():
            for port in [*frames, *frames]:
                rig.queues[TX].submit([(at[port], HEADER_BYTES + len(frames[port]))])
                sent[port] += 1
            rig.wait_used(TX, 2 * len(frames))
        exchanger.join()
        assert judge.settings.revision == rounds
        left = {port: wire.sent.count(HEADER + frame) for port, frame in frames.items()}
        assert left[25] == left[2150] == 0
        assert left[80] == sent[80] > 0
        assert 0 < left[1000] < sent[1000] and 0 < left[1001] < sent[1001]
        # Of two neighbours exactly one left, unless a table came between them.
        assert abs(left[1000] + left[1001] - sent[1000]) <= rounds


def test_N5_random_frames_never_stop_the_device(net: Target, rig: Rig, wire: Wire | TapWire) -> None:
    """Two thousand of any bytes behind an honest or odd header; then an honest one passes."""
    for number in range(2000):
        base = bytearray(ether(tcp(GUEST, 1, OUTSIDE, 80, data=os.urandom(60))))
        for value in os.urandom(number % 7):
            base[12 + value % (len(base) - 12)] = os.urandom(1)[0]
        send(rig, bytes(base))
    wire.sent.clear()
    honest = ether(tcp(GUEST, 9, OUTSIDE, 80))
    send(rig, honest)
    assert wire.sent == [HEADER + honest]


def test_N5_arp_answers_and_leases_pass(net: Target, rig: Rig, wire: Wire | TapWire) -> None:
    """The guest's own needs pass."""
    needed = [
        arp(GUEST, GATEWAY),
        arp("0.0.0.0", GUEST),
        ether(ARP(op=2, hwsrc=GUEST_MAC, psrc=GUEST, pdst=GATEWAY)),
        dhcp("discover"),
        ether(udp(GUEST, 1, GATEWAY, 53)),
        ether(ping(GUEST, GATEWAY)),
    ]
    for frame in needed:
        send(rig, frame)
    assert wire.sent == [HEADER + frame for frame in needed]

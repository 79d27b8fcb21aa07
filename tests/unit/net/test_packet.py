"""rayos_net.packet: what a frame is, by scapy's word, and that nothing unclear gets through."""

from ipaddress import ip_address
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_LSRR, IPOption_Router_Alert  # type: ignore[import-untyped,unused-ignore]
from scapy.layers.inet6 import (  # type: ignore[import-untyped,unused-ignore]
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether  # type: ignore[import-untyped,unused-ignore]

from rayos_net.packet import Fault, Packet, inner, parse
from tests.unit.net.frames import GATEWAY, GUEST, arp, ether, ping, tcp, udp, udp6

A6, B6 = "fd00::a", "fd00::b"


def flow(frame: bytes) -> tuple[int, str, str, int, int]:
    """Protocol, addresses and ports."""
    packet = parse(frame)
    assert isinstance(packet, Packet), packet
    size = 16 if packet.version == 6 else 4
    return (
        packet.protocol,
        str(ip_address(packet.source.to_bytes(size))),
        str(ip_address(packet.destination.to_bytes(size))),
        packet.source_port,
        packet.destination_port,
    )


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (tcp(GUEST, 1234, GATEWAY, 80), (6, GUEST, GATEWAY, 1234, 80)),
        (udp(GUEST, 53, GATEWAY, 5353), (17, GUEST, GATEWAY, 53, 5353)),
        (ping(GUEST, GATEWAY, 99), (1, GUEST, GATEWAY, 99, 8)),
        (ping(GUEST, GATEWAY, 99, kind=0), (1, GUEST, GATEWAY, 8, 99)),
        (
            IP(src=GUEST, dst=GATEWAY, options=[IPOption_Router_Alert()]) / UDP(sport=1, dport=2),
            (17, GUEST, GATEWAY, 1, 2),
        ),
        (IP(src=GUEST, dst=GATEWAY, proto=47) / b"gre data", (47, GUEST, GATEWAY, 0, 0)),
        (udp6(A6, 1, B6, 2), (17, A6, B6, 1, 2)),
        (IPv6(src=A6, dst=B6) / ICMPv6EchoRequest(id=5), (58, A6, B6, 5, 128)),
        (
            IPv6(src=A6, dst=B6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP(sport=1, dport=2),
            (17, A6, B6, 1, 2),
        ),
        (
            IPv6(src=A6, dst=B6) / IPv6ExtHdrFragment(offset=0, m=0, id=1) / UDP(sport=1, dport=2),
            (17, A6, B6, 1, 2),
        ),
    ],
)
def test_a_flow_is_what_scapy_put_in(payload: Any, expected: tuple[int, str, str, int, int]) -> None:
    """Options and extension headers are stepped over, not stumbled over."""
    assert flow(ether(payload)) == expected


def test_arp_gives_its_operation_and_addresses() -> None:
    """The guard decides about ARP by sender and target."""
    packet = parse(arp(GUEST, GATEWAY, operation=2))
    assert isinstance(packet, Packet)
    assert (packet.version, packet.protocol) == (0, 2)
    assert (str(ip_address(packet.source)), str(ip_address(packet.destination))) == (GUEST, GATEWAY)


def fragments(payload: Any, size: int) -> list[bytes]:
    return [ether(one) for one in payload.fragment(size)]


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        (b"", Fault.SHORT),
        (bytes(13), Fault.SHORT),
        (ether(tcp(GUEST, 1, GATEWAY, 2))[:33], Fault.SHORT),
        (ether(tcp(GUEST, 1, GATEWAY, 2))[:50], Fault.IPV4),
        (bytes(12) + b"\x08\x00" + bytes(65536), Fault.LONG),
        (ether(Dot1Q(vlan=1) / tcp(GUEST, 1, GATEWAY, 2)), Fault.VLAN),
        (ether(Dot1AD(vlan=1) / Dot1Q(vlan=2) / tcp(GUEST, 1, GATEWAY, 2)), Fault.VLAN),
        (ether(b"lldp", type=0x88CC), Fault.ETHERTYPE),
        (ether(b"802.3 length", type=12), Fault.ETHERTYPE),
        (ether(ARP(hwlen=8, psrc=GUEST, pdst=GATEWAY)), Fault.ARP),
        (ether(ARP(op=3, psrc=GUEST, pdst=GATEWAY)), Fault.ARP),
        (ether(IP(src=GUEST, dst=GATEWAY, version=6) / UDP()), Fault.IPV4),
        (ether(IP(src=GUEST, dst=GATEWAY, ihl=4) / UDP()), Fault.IPV4),
        (ether(IP(src=GUEST, dst=GATEWAY, len=2000) / UDP()), Fault.IPV4),
        (ether(IP(src=GUEST, dst=GATEWAY, len=10) / UDP()), Fault.IPV4),
        (
            ether(IP(src=GUEST, dst=GATEWAY, options=[IPOption_LSRR(routers=["1.2.3.4"])]) / UDP()),
            Fault.SOURCE_ROUTE,
        ),
        (ether(IP(src=GUEST, dst=GATEWAY, proto=6) / bytes(19)), Fault.TRANSPORT),
        (ether(IP(src=GUEST, dst=GATEWAY) / TCP(dataofs=4)), Fault.TRANSPORT),
        (ether(IP(src=GUEST, dst=GATEWAY) / TCP(dataofs=15)), Fault.TRANSPORT),
        (ether(IP(src=GUEST, dst=GATEWAY) / UDP(len=7)), Fault.TRANSPORT),
        (ether(IP(src=GUEST, dst=GATEWAY) / UDP(len=700)), Fault.TRANSPORT),
        (ether(IP(src=GUEST, dst=GATEWAY, proto=58) / bytes(16)), Fault.TRANSPORT),
        (ether(IP(src=GUEST, dst=GATEWAY, flags="MF", proto=6) / bytes(16)), Fault.FRAGMENT),
        (ether(IP(src=GUEST, dst=GATEWAY, frag=1, proto=6) / bytes(16)), Fault.FRAGMENT),
        (ether(IP(src=GUEST, dst=GATEWAY, frag=2, proto=6) / bytes(16)), Fault.FRAGMENT),
        (ether(IP(src=GUEST, dst=GATEWAY, frag=8191, proto=17) / bytes(160)), Fault.FRAGMENT),
        (ether(IPv6(src=A6, dst=B6, plen=900) / UDP()), Fault.IPV6),
        (ether(IPv6(src=A6, dst=B6) / IPv6ExtHdrRouting(type=0, addresses=[A6]) / UDP()), Fault.SOURCE_ROUTE),
        (ether(IPv6(src=A6, dst=B6) / IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop() / UDP()), Fault.EXTENSION),
        (ether(IPv6(src=A6, dst=B6) / IPv6ExtHdrDestOpt(len=200) / UDP()), Fault.EXTENSION),
        (
            ether(IPv6(src=A6, dst=B6) / IPv6ExtHdrFragment(m=1) / IPv6ExtHdrFragment(m=1) / UDP()),
            Fault.EXTENSION,
        ),
    ],
)
def test_what_cannot_be_judged_has_a_name(frame: bytes, fault: Fault) -> None:
    """Every way round a firewall in the hostile list ends in a drop that is counted (N1, N5)."""
    assert parse(frame) is fault


def test_nine_extension_headers_are_too_many() -> None:
    """The walk is bounded."""
    payload: Any = IPv6(src=A6, dst=B6)
    for _ in range(9):
        payload = payload / IPv6ExtHdrDestOpt()
    assert parse(ether(payload / UDP())) is Fault.EXTENSION


def test_fragments_carry_their_identification_and_only_the_first_has_ports() -> None:
    """Later fragments can be matched to the first."""
    first, second = (parse(one) for one in fragments(udp(GUEST, 5, GATEWAY, 6, bytes(1400)), 800))
    assert isinstance(first, Packet)
    assert isinstance(second, Packet)
    assert first.fragment == second.fragment >= 0
    assert (first.source_port, first.destination_port, first.offset) == (5, 6, 0)
    assert (second.source_port, second.destination_port) == (0, 0)
    assert second.offset == 800


def test_an_icmp_error_tells_which_flow_it_is_about() -> None:
    """Port unreachable for a UDP datagram: the flow inside, as it was sent."""
    about = udp(GUEST, 5, GATEWAY, 6)
    frame = ether(IP(src=GATEWAY, dst=GUEST) / ICMP(type=3, code=3) / bytes(about)[:28])
    packet = parse(frame)
    assert isinstance(packet, Packet)
    assert inner(frame, packet) == (17, int(ip_address(GUEST)), int(ip_address(GATEWAY)), 5, 6)
    request = ether(ping(GUEST, GATEWAY))
    assert inner(request, parse(request)) is None  # type: ignore[arg-type]


def test_a_random_frame_is_a_packet_or_a_fault() -> None:
    """scapy's random packets and their truncations never raise."""
    whole = bytes(
        Ether() / IPv6(src=A6, dst=B6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrFragment(m=1) / UDP() / bytes(40)
    )
    for size in range(len(whole)):
        assert isinstance(parse(whole[:size]), Packet | Fault)

"""The guard in the kernel, in Python and in the device's path: the same frames, the same verdicts."""

import os
import random
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Interface, ip_address
from pathlib import Path
from typing import Any, Final

import pytest
from scapy.layers.inet import IP, TCP, UDP, IPOption_LSRR, IPOption_Router_Alert  # type: ignore[import-untyped,unused-ignore]
from scapy.layers.inet6 import (  # type: ignore[import-untyped,unused-ignore]
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1Q  # type: ignore[import-untyped,unused-ignore]

from rayos_devices.net.backend import TX, NetBackend
from rayos_net import nft
from rayos_net.guard import Guard
from rayos_net.link import Links
from rayos_net.packet import Fault, parse
from rayos_net.tap import VNET_HEADER_SIZE
from rayos_vmm.worker.firewall import PortFirewall
from tests.framework.target import Rig, Stepped
from tests.framework.wire import Wire
from tests.integration.net.lab import Lab
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

pytestmark = pytest.mark.root
MAC: Final = bytes.fromhex(GUEST_MAC.replace(":", ""))
FRAMES: Final = 10_000
OUTSIDE: Final = "93.184.216.34"
MARKER: Final = ether(
    ARP(op=1, hwsrc=GUEST_MAC, psrc="0.0.0.0", pdst="10.5.255.255"), destination="ff:ff:ff:ff:ff:ff"
)
HEADER: Final = bytes(VNET_HEADER_SIZE)


def bases() -> list[bytes]:
    """Honest frames, forged ones and odd ones."""
    big = udp(GUEST, 1, OUTSIDE, 9, bytes(1400))
    payloads: list[Any] = [
        tcp(GUEST, 1, OUTSIDE, 80),
        tcp(GUEST, 1, OUTSIDE, 80, data=bytes(50)),
        tcp("10.5.0.11", 1, OUTSIDE, 80),
        udp(GUEST, 1, OUTSIDE, 53),
        udp(GUEST, 67, OUTSIDE, 53),
        udp(GUEST, 1, GATEWAY, 68),
        udp("0.0.0.0", 1, GATEWAY, 9),
        ping(GUEST, GATEWAY),
        IP(src=GUEST, dst=OUTSIDE, proto=47) / bytes(30),
        IP(src=GUEST, dst=OUTSIDE, proto=58) / bytes(30),
        IP(src=GUEST, dst=OUTSIDE, options=[IPOption_LSRR(routers=["1.2.3.4"])]) / UDP(sport=1, dport=2),
        IP(src=GUEST, dst=OUTSIDE, options=[IPOption_Router_Alert()]) / UDP(sport=1, dport=2),
        IP(src=GUEST, dst=OUTSIDE, frag=1, proto=6) / bytes(40),
        IP(src=GUEST, dst=OUTSIDE, frag=3, proto=6) / bytes(40),
        IP(src=GUEST, dst=OUTSIDE, flags="MF", proto=6) / bytes(12),
        IP(src=GUEST, dst=OUTSIDE, len=2000) / UDP(),
        IP(src=GUEST, dst=OUTSIDE) / TCP(dataofs=4),
        udp6(GUEST6, 1, "ff02::fb", 5353),
        udp6(GUEST6, 547, "fe80::2", 546),
        udp6("fe80::1", 1, "ff02::fb", 5353),
        IPv6(src=GUEST6, dst="fe80::2") / ICMPv6EchoRequest(),
        IPv6(src=GUEST6, dst="fe80::2") / TCP(sport=1, dport=2),
        IPv6(src=GUEST6, dst="ff02::1") / ICMPv6ND_RA(),
        IPv6(src=GUEST6, dst="ff02::1") / ICMPv6ND_NA(tgt=GUEST6),
        IPv6(src=GUEST6, dst="ff02::1") / ICMPv6ND_NA(tgt="fe80::1"),
        IPv6(src=GUEST6, dst="ff02::1") / ICMPv6ND_NS(tgt="fe80::1"),
        IPv6(src="::", dst="ff02::1:ff00:1") / ICMPv6ND_NS(tgt=GUEST6),
        IPv6(src="::", dst="ff02::1:ff00:1") / ICMPv6ND_NS(tgt="fe80::1"),
        IPv6(src="::", dst="ff02::16") / IPv6ExtHdrHopByHop() / ICMPv6MLReport2(),
        IPv6(src=GUEST6, dst="fe80::2") / IPv6ExtHdrRouting(type=0, addresses=["fe80::9"]) / UDP(),
        IPv6(src=GUEST6, dst="fe80::2") / IPv6ExtHdrFragment(m=1, id=5) / UDP(sport=1, dport=2) / bytes(32),
        IPv6(src=GUEST6, dst="fe80::2") / IPv6ExtHdrFragment(offset=1, nh=6, id=5) / bytes(32),
        IPv6(src=GUEST6, dst="fe80::2") / IPv6ExtHdrFragment(offset=4, nh=6, id=5) / bytes(32),
        Dot1Q(vlan=1) / tcp(GUEST, 1, OUTSIDE, 80),
        *big.fragment(800),
    ]
    frames = [ether(payload) for payload in payloads]
    frames += [ether(payload, destination="ff:ff:ff:ff:ff:ff") for payload in payloads[:4]]
    frames += [ether(tcp(GUEST, 1, OUTSIDE, 80), source=OTHER_MAC), ether(b"lldp", type=0x88CC)]
    frames += [
        arp(GUEST, GATEWAY),
        arp("0.0.0.0", GUEST),
        arp(GATEWAY, GUEST, operation=2),
        arp(GUEST, GATEWAY, mac=OTHER_MAC),
    ]
    frames += [dhcp("discover"), dhcp("discover", mac=b"\2" * 6), dhcp("offer", sport=67, dport=68)]
    return [frame for frame in frames if len(frame) >= 14]


def mutate(chance: random.Random, frame: bytes) -> bytes:
    """Up to two changed bytes in the headers, or a cut."""
    data = bytearray(frame)
    for _ in range(chance.randrange(3)):
        data[chance.randrange(6, min(len(data), 80))] = chance.choice(
            (0, 1, 6, 17, 58, 67, 68, chance.randrange(256))
        )
    return bytes(data[: max(14, len(data) - chance.choice((0, 0, 0, chance.randrange(60))))])


def python_says(guard: Guard, frame: bytes) -> bool:
    """Whether parser and guard let the frame out."""
    packet = parse(frame)
    return not isinstance(packet, Fault) and guard.check_out(frame, packet) == 0


def is_beyond_nft(frame: bytes) -> bool:
    """Frames of which rayos_net.firewall.nftables says that only the parser knows: about 40 of these 10,000 differ."""
    packet = parse(frame)
    return packet in (Fault.TRANSPORT, Fault.EXTENSION, Fault.SOURCE_ROUTE)


def is_later_fragment(frame: bytes) -> bool:
    """The device lets one pass only behind its first."""
    packet = parse(frame)
    return not isinstance(packet, Fault) and packet.offset > 0


@contextmanager
def device(guard: Guard) -> Iterator[Callable[[bytes], bool]]:
    """Whether a frame leaves the network device, by way of its ring, its flow cache and the worker's firewall."""
    wire = Wire()
    judge = PortFirewall(guard.mac, fixed=guard.addresses)
    with Stepped(lambda loop: NetBackend("net", loop, wire, judge=judge)) as target, Rig(target, 2) as rig:

        def through(frame: bytes) -> bool:
            rig.ram.rewind(rig.heap)
            rig.queues[TX].submit([(rig.ram.put(HEADER + frame), len(HEADER + frame))])
            rig.wait_used(TX)
            sent, wire.sent = wire.sent, []
            assert sent in ([], [HEADER + frame])
            return bool(sent)

        yield through


@contextmanager
def two_taps(links: Links) -> Iterator[tuple[int, int]]:
    """A guarded tap and one that hears what the bridge lets through."""
    links.ensure_bridge("ray0", IPv4Interface("10.91.0.1/24"))
    for kind in ("iptables", "ip6tables", "arptables"):  # else the bridge itself drops bad IP headers
        Path(f"/proc/sys/net/bridge/bridge-nf-call-{kind}").write_text("0")
    guest = links.open_tap("ray-a-0", bridge="ray0")
    try:
        other = links.open_tap("ray-b-0", bridge="ray0")
        try:
            yield guest, other
        finally:
            os.close(other)
    finally:
        os.close(guest)


def passes(guest: int, other: int, frame: bytes) -> bool:
    """Whether the frame comes out at the other tap, before a marker that was sent behind it."""
    try:
        os.write(guest, HEADER + frame)
    except OSError:
        return False  # the kernel's tap refuses it
    os.write(guest, HEADER + MARKER)
    seen = False
    while True:
        readable, _, _ = select.select([other], [], [], 5.0)
        assert readable, "the marker was lost"
        got = os.read(other, 65536)[VNET_HEADER_SIZE:]
        if got == MARKER:
            return seen
        seen = seen or got[: len(frame)] == frame


def test_the_kernel_gives_the_same_verdicts_as_python(lab: Lab) -> None:
    """10,000 frames, honest, forged and broken, through a real tap and through rayos_net.guard."""
    guard = Guard(MAC, addresses=[int(ip_address(GUEST))])
    chance = random.Random(11)
    frames = bases()
    frames += [mutate(chance, chance.choice(frames)) for _ in range(FRAMES - len(frames))]
    different = []
    allowed = compared = 0
    with Links() as links, two_taps(links) as (guest, other), device(guard) as through_device:
        nft.guard_tap("ray-a-0", guard, dhcp_per_second=None)
        for frame in frames:
            kernel, ours = passes(guest, other, frame), python_says(guard, frame)
            if is_beyond_nft(frame):
                continue
            compared += 1
            allowed += ours
            if through_device(frame) is not ours and not is_later_fragment(frame):
                different.append((frame.hex(), "guard allows" if ours else "device sends", str(parse(frame))))
            if kernel is not ours:
                different.append(
                    (frame.hex(), "kernel allows" if kernel else "kernel drops", str(parse(frame)))
                )
    assert compared > 9 * FRAMES // 10
    assert allowed > FRAMES // 5
    assert not different[:5]


def test_a_storm_of_dhcp_is_cut_in_the_kernel(lab: Lab) -> None:
    """Before the server spends time on it; a client's own few messages pass."""
    with Links() as links, two_taps(links) as (guest, other):
        nft.guard_tap("ray-a-0", Guard(MAC))
        began = time.monotonic()
        through = sum(passes(guest, other, dhcp("discover")) for _ in range(500))
        seconds = time.monotonic() - began
    # 50 a second, and a burst of 5: however slowly a crowded machine sends them.
    assert 5 <= through <= 5 + 50 * (seconds + 1)


def test_the_kernels_guard_follows_the_lease_and_goes_with_the_tap(lab: Lab) -> None:
    """bind_tap changes the address in one transaction; unguard_tap leaves nothing."""
    guard = Guard(MAC)
    frame = ether(udp(GUEST, 1, OUTSIDE, 9))
    with Links() as links, two_taps(links) as (guest, other):
        nft.guard_tap("ray-a-0", guard)
        assert not passes(guest, other, frame)
        nft.bind_tap("ray-a-0", [int(ip_address(GUEST))])
        assert passes(guest, other, frame)
        nft.guard_tap("ray-a-0", guard)
        assert not passes(guest, other, frame)
        nft.unguard_tap("ray-a-0")
        nft.unguard_tap("ray-a-0")
        assert passes(guest, other, frame)


def test_a_refused_script_is_one_sentence(lab: Lab) -> None:
    """And changes nothing."""
    with pytest.raises(nft.NftError, match=r"nft: .*No such file or directory"):
        nft.bind_tap("nowhere", [1])


def test_multicast_queries_of_a_guest_stop_at_the_kernel(lab: Lab) -> None:
    """Who asks for listeners is the querier of the network; a guest may say what it listens to."""
    guard = Guard(MAC, addresses=[int(ip_address(GUEST))])
    igmp = IP(src=GUEST, dst="224.0.0.1", proto=2)
    mld = IPv6(src=GUEST6, dst="ff02::1", nh=58)
    with Links() as links, two_taps(links) as (guest, other):
        nft.guard_tap("ray-a-0", guard, dhcp_per_second=None)
        for payload, is_sent in (
            (igmp / bytes.fromhex("1164000000000000"), False),
            (igmp / bytes.fromhex("1600000000000000"), True),
            (mld / bytes.fromhex("82000000" + "00" * 20), False),
            (mld / bytes.fromhex("83000000" + "00" * 20), True),
        ):
            frame = ether(payload)
            assert python_says(guard, frame) is is_sent
            assert passes(guest, other, frame) is is_sent

"""rayos_net.firewall.text: what a person types is the packet that is judged, and what is told is what was seen."""

import pytest

from rayos_net.firewall.text import BadText, describe, frame
from rayos_net.packet import parse
from tests.unit.net.frames import GATEWAY, GUEST, arp, ether, ping, udp

GUEST_MAC, OTHER_MAC = b"\x52\x59\0\0\0\1", b"\x52\x59\0\0\0\2"


@pytest.mark.parametrize(
    "words",
    [
        "tcp 10.0.0.2:4000 > 93.184.216.34:80",
        "udp 10.0.0.2:4000 > 10.0.0.1:53",
        "icmp 10.0.0.2:7 > 10.0.0.1:8",
        "icmp 10.0.0.2:8 > 10.0.0.1:7",
        "icmp 10.0.0.2:4 > 10.0.0.1:3",
        "tcp [fd00::1]:1 > [fd00::2]:65535",
        "icmpv6 [fd00::1]:9 > [fd00::2]:128",
        "47 10.0.0.2 > 10.0.0.1",
    ],
)
def test_words_and_packet_are_the_same(words: str) -> None:
    """describe(parse(frame(words))) = words, for each protocol and version."""
    for direction, outgoing in (("in", False), ("out", True), ("", True)):
        data, goes_out = frame(f"{direction} {words}", guest=GUEST_MAC, other=OTHER_MAC)
        assert describe(parse(data)) == words
        assert goes_out is outgoing
        assert data[6:12] == (GUEST_MAC if outgoing else OTHER_MAC)


def test_other_frames_have_words_too() -> None:
    """ARP, fragments, and what is malformed."""
    assert describe(parse(arp(GUEST, GATEWAY))) == f"arp who-has {GATEWAY} from {GUEST}"
    second = udp(GUEST, 1, GATEWAY, 2, bytes(1400)).fragment(800)[1]
    assert describe(parse(ether(second))) == f"udp {GUEST} > {GATEWAY} (fragment 1 at 800)"
    assert describe(parse(ether(ping(GUEST, GATEWAY))[:40])) == "malformed (ipv4)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hello", "write it like"),
        ("tcp 10.0.0.2:4000", "write it like"),
        ("tcp 10.0.0.2:x > 10.0.0.1:1", "no address with a port"),
        ("tcp 10.0.0.2:1 > 10.0.0.1:70000", "outside 0..65535"),
        ("tcp 10.0.0.2:1 > [fd00::1]:1", "different IP versions"),
        ("999 10.0.0.2 > 10.0.0.1", "outside 0..255"),
    ],
)
def test_wrong_words_are_one_sentence(words: str, message: str) -> None:
    """And say how to write it."""
    with pytest.raises(BadText, match=message):
        frame(words, guest=GUEST_MAC, other=OTHER_MAC)

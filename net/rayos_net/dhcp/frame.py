"""Ethernet frames that DHCP needs: UDP over IPv4 to a host without an address, and ARP (RFC 791, 768, 826,
5227).

Invariant: nothing is read outside the frame; fragments, VLAN tags and wrong lengths give None.

The UDP checksum of received datagrams is not checked: frames from a tap or veth of the same host carry an
unfinished one by design (CHECKSUM_PARTIAL). Ours is 0, "not computed" (RFC 768), which every client accepts.
"""

import struct
from typing import Final, NamedTuple

BROADCAST_MAC: Final = b"\xff" * 6
ETHER_IPV4: Final = b"\x08\x00"
ETHER_ARP: Final = b"\x08\x06"
SERVER_PORT: Final = 67  # RFC 2131, 4.1
CLIENT_PORT: Final = 68

_ETHER_IP: Final = struct.Struct("!6x6sHBxH2xHxB2xII")  # up to the addresses, without what is not looked at
_UDP: Final = struct.Struct("!HHH")
_IP_UDP: Final = struct.Struct("!BBHHHBBHIIHHHH")
_ARP: Final = struct.Struct("!HHBBH6s4s6s4s")
_ARP_AT: Final = 14
_IP_AT: Final = 14
_FRAME_MIN: Final = 42  # Ethernet 14, IPv4 20, UDP 8


class Datagram(NamedTuple):
    """A UDP datagram and the addresses around it."""

    hardware: bytes  # the sender's
    source: int
    destination: int
    source_port: int
    payload: bytes


class Arp(NamedTuple):
    """An ARP packet for IPv4 over Ethernet."""

    operation: int  # 1 request, 2 reply
    sender_hardware: bytes
    sender: int
    target_hardware: bytes
    target: int


def datagram(frame: bytes, port: int) -> Datagram | None:
    """The UDP datagram to `port` in an Ethernet frame, or None when the frame is anything else."""
    size = len(frame)
    if size < _FRAME_MIN:
        return None
    hardware, kind, version_length, total, fragment, protocol, source, destination = _ETHER_IP.unpack_from(
        frame
    )
    header = (version_length & 0x0F) * 4
    at = _IP_AT + header
    if kind != 0x0800 or version_length >> 4 != 4 or header < 20 or at + 8 > size or protocol != 17:
        return None
    if fragment & 0x3FFF or total < header + 8 or _IP_AT + total > size:
        return None
    source_port, destination_port, length = _UDP.unpack_from(frame, at)
    if not 8 <= length <= total - header or destination_port != port:
        return None
    return Datagram(hardware, source, destination, source_port, frame[at + 8 : at + length])


def udp_frame(
    hardware: bytes,
    to_hardware: bytes,
    source: int,
    destination: int,
    source_port: int,
    destination_port: int,
    payload: bytes,
) -> bytes:
    """An Ethernet frame with a UDP datagram in it."""
    length = 8 + len(payload)
    total = 20 + length
    words = (
        0x4500 + total + 0x4000 + 0x4011  # version and length; total; don't fragment; TTL 64 and protocol 17
        + (source >> 16) + (source & 0xFFFF) + (destination >> 16) + (destination & 0xFFFF)
    )  # fmt: skip
    words = (words & 0xFFFF) + (words >> 16)
    checksum = ~((words & 0xFFFF) + (words >> 16)) & 0xFFFF
    headers = _IP_UDP.pack(
        0x45,
        0,
        total,
        0,
        0x4000,
        64,
        17,
        checksum,
        source,
        destination,
        source_port,
        destination_port,
        length,
        0,
    )
    return b"".join((to_hardware, hardware, ETHER_IPV4, headers, payload))


def arp_frame(
    hardware: bytes, sender: int, target: int, *, to: bytes = BROADCAST_MAC, reply: bool = False
) -> bytes:
    """An ARP packet in a frame of the least size. A probe has sender 0, an announcement sender = target (RFC
    5227).
    """
    body = _ARP.pack(
        1,
        0x0800,
        6,
        4,
        2 if reply else 1,
        hardware,
        sender.to_bytes(4, "big"),
        to if reply else bytes(6),
        target.to_bytes(4, "big"),
    )
    return (to + hardware + ETHER_ARP + body).ljust(60, b"\0")


def arp(frame: bytes) -> Arp | None:
    """The ARP packet in a frame, None when it is anything else or not IPv4 over Ethernet."""
    if len(frame) < _ARP_AT + _ARP.size or frame[12:14] != ETHER_ARP:
        return None
    kind, protocol, hlen, plen, operation, sha, spa, tha, tpa = _ARP.unpack_from(frame, _ARP_AT)
    if (kind, protocol, hlen, plen) != (1, 0x0800, 6, 4):
        return None
    return Arp(operation, sha, int.from_bytes(spa, "big"), tha, int.from_bytes(tpa, "big"))

"""Ethernet frames from a guest, parsed as far as a firewall needs (IEEE 802.3, RFC 791, 768, 793, 826, 8200,
4443).

Invariant: every byte is read inside the frame and every length is checked against the one around it; a frame
gives a Packet or exactly one Fault, never an exception. Work is bounded: at most 8 IPv6 extension headers,
40 bytes of options.

Only bytes in and integers out, no closures: the module can be compiled in Cython's pure-Python mode as it
stands.

ICMP has no ports. For rules and flows an echo request is from port *identifier* to port *type* (8 or 128)
and its reply from that type to the identifier, as with a client and a server; other messages are from port
*code* to port *type*.
"""

import struct
from enum import IntEnum
from typing import Final, NamedTuple

ETHER_IPV4: Final = 0x0800
ETHER_ARP: Final = 0x0806
ETHER_IPV6: Final = 0x86DD

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58

ETHER_SIZE: Final = 14
EXTENSIONS_MAX: Final = 8  # RFC 8200, 4.1 lists seven, each once but one

_ARP: Final = struct.Struct("!HHBBH6sI6sI")
_IPV4: Final = struct.Struct("!BBHHHBBHII")
_IPV6: Final = struct.Struct("!IHBB16s16s")
_PORTS: Final = struct.Struct("!HH")

_HOP_BY_HOP: Final = 0
_ROUTING: Final = 43
_FRAGMENT: Final = 44
_AUTHENTICATION: Final = 51
_DESTINATION: Final = 60


class Fault(IntEnum):
    """Why a frame can't be judged and is dropped."""

    SHORT = 1  # less than its headers need
    LONG = 2  # above 64 KiB and an Ethernet header
    VLAN = 3  # a tag (802.1Q, QinQ): guests have no VLANs
    ETHERTYPE = 4  # neither IPv4, IPv6 nor ARP
    ARP = 5  # not IPv4 over Ethernet, or neither request nor reply
    IPV4 = 6  # version, header or total length wrong
    IPV6 = 7  # version or payload length wrong
    SOURCE_ROUTE = 8  # IPv4 options 131, 137; IPv6 routing header type 0 (RFC 5095)
    EXTENSION = 9  # IPv6 extension headers too many, cut short or out of place
    TRANSPORT = 10  # TCP, UDP or ICMP header cut short or inconsistent
    FRAGMENT = 11  # too small for its headers, or overlapping them (RFC 1858, RFC 5722)

    @property
    def is_malformed(self) -> bool:
        """Whether no network would take the frame; the others are sound, and guests have no use of them."""
        return self not in (Fault.VLAN, Fault.ETHERTYPE, Fault.SOURCE_ROUTE)


class Packet(NamedTuple):
    """The fields of a frame that a firewall asks about. Addresses are integers; ports are 0 where there are none."""

    destination_mac: bytes
    source_mac: bytes
    ethertype: int
    version: int  # 4, 6; 0 for ARP
    protocol: int  # IP protocol after extension headers; the operation for ARP
    source: int
    destination: int
    source_port: int
    destination_port: int
    fragment: int  # identification, -1 when the packet is whole
    offset: int  # of this fragment in bytes
    transport: int  # where the transport header begins in the frame
    end: int  # where the IP packet ends in the frame


def parse(frame: bytes) -> Packet | Fault:
    """The packet in an Ethernet frame (without virtio-net header), or why it can't be judged."""
    size = len(frame)
    if size < ETHER_SIZE:
        return Fault.SHORT
    if size > 65535 + ETHER_SIZE:
        return Fault.LONG
    ethertype = (frame[12] << 8) | frame[13]
    if ethertype == ETHER_IPV4:
        return _parse_ipv4(frame, size)
    if ethertype == ETHER_IPV6:
        return _parse_ipv6(frame, size)
    if ethertype == ETHER_ARP:
        return _parse_arp(frame, size)
    if ethertype in (0x8100, 0x88A8, 0x9100, 0x9200):
        return Fault.VLAN
    return Fault.ETHERTYPE


def inner(frame: bytes, packet: Packet) -> tuple[int, int, int, int, int] | None:
    """For an ICMP error, the flow (protocol, source, destination, ports) of the packet it is about; else
    None.
    """
    at = packet.transport
    if packet.protocol == ICMP:
        if frame[at] not in (3, 11, 12):
            return None
        return _inner_ipv4(frame, at + 8, packet.end)
    if packet.protocol == ICMPV6 and frame[at] in (1, 2, 3, 4):
        return _inner_ipv6(frame, at + 8, packet.end)
    return None


def _parse_arp(frame: bytes, size: int) -> Packet | Fault:
    if size < ETHER_SIZE + _ARP.size:
        return Fault.SHORT
    kind, protocol, hlen, plen, operation, _, sender, _, target = _ARP.unpack_from(frame, ETHER_SIZE)
    if kind != 1 or protocol != ETHER_IPV4 or hlen != 6 or plen != 4 or operation not in (1, 2):
        return Fault.ARP
    end = ETHER_SIZE + _ARP.size
    return Packet(
        frame[0:6], frame[6:12], ETHER_ARP, 0, operation, sender, target, 0, 0, -1, 0, ETHER_SIZE, end
    )


def _parse_ipv4(frame: bytes, size: int) -> Packet | Fault:
    if size < ETHER_SIZE + 20:
        return Fault.SHORT
    first, _, total, identification, flags, _, protocol, _, source, destination = _IPV4.unpack_from(
        frame, ETHER_SIZE
    )
    header = (first & 0x0F) * 4
    if first >> 4 != 4 or header < 20 or total < header or ETHER_SIZE + total > size:
        return Fault.IPV4
    if header > 20 and _is_source_routed(frame, ETHER_SIZE + 20, ETHER_SIZE + header):
        return Fault.SOURCE_ROUTE
    at = ETHER_SIZE + header
    end = ETHER_SIZE + total
    offset = (flags & 0x1FFF) * 8
    more = flags & 0x2000
    fragment = identification if more or offset else -1
    if offset + total - header > 65535:
        return Fault.FRAGMENT  # past the end of the largest packet
    return _transport(frame, ETHER_IPV4, 4, protocol, source, destination, fragment, offset, at, end)


def _parse_ipv6(frame: bytes, size: int) -> Packet | Fault:
    if size < ETHER_SIZE + 40:
        return Fault.SHORT
    first, length, following, _, source, destination = _IPV6.unpack_from(frame, ETHER_SIZE)
    at = ETHER_SIZE + 40
    end = at + length
    if first >> 28 != 6 or end > size:
        return Fault.IPV6
    fragment = -1
    offset = 0
    for count in range(EXTENSIONS_MAX + 1):
        if following not in (_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION):
            break
        if count == EXTENSIONS_MAX or at + 8 > end or (fragment >= 0 and offset > 0):
            return Fault.EXTENSION
        if following == _HOP_BY_HOP and count > 0:
            return Fault.EXTENSION  # only right behind the header (RFC 8200, 4.1)
        if following == _ROUTING and frame[at + 2] == 0:
            return Fault.SOURCE_ROUTE
        extent = (frame[at + 1] + 1) * 8
        if following == _AUTHENTICATION:
            extent = (frame[at + 1] + 2) * 4
        if following == _FRAGMENT:
            extent = 8
            field = (frame[at + 2] << 8) | frame[at + 3]
            if fragment >= 0:
                return Fault.EXTENSION
            if field & 0xFFF9:  # else an atomic fragment (RFC 6946): a whole packet
                offset = field & 0xFFF8
                fragment = int.from_bytes(frame[at + 4 : at + 8], "big")
        following = frame[at]
        at += extent
        if at > end:
            return Fault.EXTENSION
        if offset:
            break  # what follows is payload
    source_address = int.from_bytes(source, "big")
    destination_address = int.from_bytes(destination, "big")
    return _transport(
        frame, ETHER_IPV6, 6, following, source_address, destination_address, fragment, offset, at, end
    )


def _transport(
    frame: bytes,
    ethertype: int,
    version: int,
    protocol: int,
    source: int,
    destination: int,
    fragment: int,
    offset: int,
    at: int,
    end: int,
) -> Packet | Fault:
    source_port = 0
    destination_port = 0
    room = end - at
    if offset:
        # RFC 1858, 3.2: no later fragment may reach back into the transport header.
        if offset < (24 if protocol == TCP else 8) or room == 0:
            return Fault.FRAGMENT
    elif protocol in (TCP, UDP):
        needed = 20 if protocol == TCP else 8
        if room < needed:
            return Fault.FRAGMENT if fragment >= 0 else Fault.TRANSPORT
        source_port, destination_port = _PORTS.unpack_from(frame, at)
        if protocol == TCP:
            header = (frame[at + 12] >> 4) * 4
            if header < 20 or (header > room and fragment < 0):
                return Fault.TRANSPORT
        elif fragment < 0:
            length = (frame[at + 4] << 8) | frame[at + 5]
            if length < 8 or length > room:
                return Fault.TRANSPORT
    elif (protocol == ICMP and version == 4) or (protocol == ICMPV6 and version == 6):
        if room < 8:
            return Fault.FRAGMENT if fragment >= 0 else Fault.TRANSPORT
        kind = frame[at]
        identifier = (frame[at + 4] << 8) | frame[at + 5]
        if kind in (8, 128):
            source_port, destination_port = identifier, kind
        elif kind == 0 and version == 4:
            source_port, destination_port = 8, identifier
        elif kind == 129:
            source_port, destination_port = 128, identifier
        else:
            source_port, destination_port = frame[at + 1], kind
    elif protocol in (ICMP, ICMPV6):
        return Fault.TRANSPORT  # the other version's ICMP
    return Packet(
        frame[0:6],
        frame[6:12],
        ethertype,
        version,
        protocol,
        source,
        destination,
        source_port,
        destination_port,
        fragment,
        offset,
        at,
        end,
    )


def _is_source_routed(frame: bytes, at: int, end: int) -> bool:
    # Also true for options that break their format: then nobody knows what a router makes of them.
    while at < end:
        kind = frame[at]
        if kind == 0:
            return False
        if kind == 1:
            at += 1
            continue
        if kind in (131, 137) or at + 1 >= end or frame[at + 1] < 2:
            return True
        at += frame[at + 1]
    return at > end


def _inner_ipv4(frame: bytes, at: int, end: int) -> tuple[int, int, int, int, int] | None:
    if at + 28 > end:
        return None
    header = (frame[at] & 0x0F) * 4
    if frame[at] >> 4 != 4 or header < 20 or at + header + 8 > end:
        return None
    source = int.from_bytes(frame[at + 12 : at + 16], "big")
    destination = int.from_bytes(frame[at + 16 : at + 20], "big")
    return _inner_ports(frame, at + header, frame[at + 9], source, destination)


def _inner_ipv6(frame: bytes, at: int, end: int) -> tuple[int, int, int, int, int] | None:
    if at + 48 > end or frame[at] >> 4 != 6:
        return None
    source = int.from_bytes(frame[at + 8 : at + 24], "big")
    destination = int.from_bytes(frame[at + 24 : at + 40], "big")
    return _inner_ports(frame, at + 40, frame[at + 6], source, destination)


def _inner_ports(
    frame: bytes, at: int, protocol: int, source: int, destination: int
) -> tuple[int, int, int, int, int] | None:
    if protocol in (TCP, UDP):
        source_port, destination_port = _PORTS.unpack_from(frame, at)
        return protocol, source, destination, source_port, destination_port
    if protocol in (ICMP, ICMPV6) and frame[at] in (8, 128):
        return protocol, source, destination, (frame[at + 4] << 8) | frame[at + 5], frame[at]
    return None

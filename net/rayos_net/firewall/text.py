"""Packets in words, for `explain` and `trace`: `out tcp 10.0.0.2:4000 > 93.184.216.34:80`.

Invariant: `frame` of what `describe` says about a TCP, UDP or ICMP packet has the same flow.
"""

import re
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from rayos_net.firewall.reject import checksum
from rayos_net.packet import ETHER_ARP, ICMP, ICMPV6, TCP, UDP, Fault, Packet

_NAMES: Final = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPV6: "icmpv6"}
_WORDS: Final = re.compile(
    r"(?:(?P<direction>in|out)\s+)?(?P<protocol>tcp|udp|icmp|icmpv6|\d{1,3})\s+"
    r"(?P<source>\S+?)\s*(?:>|to)\s*(?P<destination>\S+)\s*\Z"
)
_IPV4: Final = struct.Struct("!BBHHHBBHII")


class BadText(ValueError):
    """The words are no packet; the text says what was expected."""


def describe(packet: Packet | Fault) -> str:
    """A packet in words, or the name of what is wrong with it."""
    if isinstance(packet, Fault):
        return f"malformed ({packet.name.lower()})"
    if packet.ethertype == ETHER_ARP:
        kind = "who-has" if packet.protocol == 1 else "is-at"
        return f"arp {kind} {IPv4Address(packet.destination)} from {IPv4Address(packet.source)}"
    name = _NAMES.get(packet.protocol, str(packet.protocol))
    source, destination = (_address(one, packet.version) for one in (packet.source, packet.destination))
    if packet.offset:
        return f"{name} {source} > {destination} (fragment {packet.fragment} at {packet.offset})"
    if packet.protocol not in _NAMES:
        return f"{name} {source} > {destination}"
    return f"{name} {source}:{packet.source_port} > {destination}:{packet.destination_port}"


def frame(text: str, *, guest: bytes, other: bytes) -> tuple[bytes, bool]:
    """The frame that the words stand for, and whether it goes out of the guest (the default).

    `guest` and `other` are hardware addresses. IPv6 addresses with a port are in brackets. Raises BadText.
    """
    match = _WORDS.match(text.strip())
    if match is None:
        raise BadText(f"{text!r} is no packet; write it like: out tcp 10.0.0.2:4000 > 93.184.216.34:80")
    named = {name: number for number, name in _NAMES.items()}
    protocol = named.get(match["protocol"]) or int(match["protocol"])
    if protocol > 255:
        raise BadText(f"protocol {protocol} is outside 0..255")
    source, source_port = _endpoint(match["source"])
    destination, port = _endpoint(match["destination"])
    if source.version != destination.version:
        raise BadText(f"{source} and {destination} are of different IP versions")
    body = _body(protocol, source_port, port)
    outgoing = match["direction"] != "in"
    macs = other + guest if outgoing else guest + other
    if source.version == 6:
        head = struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + source.packed + destination.packed
        return macs + b"\x86\xdd" + head + body, outgoing
    head = _IPV4.pack(0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0, int(source), int(destination))
    head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    return macs + b"\x08\x00" + head + body, outgoing


def _body(protocol: int, source_port: int, port: int) -> bytes:
    if protocol == TCP:
        return struct.pack("!HHIIBBHHH", source_port, port, 0, 0, 0x50, 2, 0, 0, 0)
    if protocol == UDP:
        return struct.pack("!HHHH", source_port, port, 8, 0)
    if protocol in (ICMP, ICMPV6):
        reply = {(ICMP, 8): 0, (ICMPV6, 128): 129}.get((protocol, source_port))
        if reply is not None:  # from type to identifier: the answer to an echo request
            return struct.pack("!BBHHH", reply, 0, 0, port, 0)
        if port in (8, 128):
            return struct.pack("!BBHHH", port, 0, 0, source_port, 0)
        return struct.pack("!BBHHH", port & 0xFF, source_port & 0xFF, 0, 0, 0)
    return b""


def _endpoint(text: str) -> tuple[IPv4Address | IPv6Address, int]:
    host, port = text, "0"
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":") or "0"
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    try:
        address, number = ip_address(host), int(port)
    except ValueError:
        raise BadText(f"{text!r} is no address with a port, like 10.0.0.2:80 or [fd00::1]:80") from None
    if not 0 <= number <= 65535:
        raise BadText(f"port {number} is outside 0..65535")
    return address, number


def _address(value: int, version: int) -> str:
    return str(IPv4Address(value)) if version == 4 else f"[{IPv6Address(value)}]"

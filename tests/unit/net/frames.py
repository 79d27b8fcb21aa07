"""Frames made by scapy, as a guest would send them."""

from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP  # type: ignore[import-untyped,unused-ignore]
from scapy.layers.inet6 import IPv6  # type: ignore[import-untyped,unused-ignore]
from scapy.layers.l2 import ARP, Ether  # type: ignore[import-untyped,unused-ignore]

GUEST_MAC = "52:59:00:00:00:01"
OTHER_MAC = "52:59:00:00:00:02"
GUEST = "10.5.0.10"
GATEWAY = "10.5.0.1"
GUEST6 = "fe80::5059:ff:fe00:1"


def ether(payload: Any, *, source: str = GUEST_MAC, destination: str = OTHER_MAC, **more: Any) -> bytes:
    """A frame of the guest's around a layer."""
    return bytes(Ether(src=source, dst=destination, **more) / payload)


def tcp(
    source: str, port: int, destination: str, to_port: int, *, flags: str = "S", data: bytes = b""
) -> Any:
    """A TCP segment."""
    return IP(src=source, dst=destination) / TCP(sport=port, dport=to_port, flags=flags) / data


def udp(source: str, port: int, destination: str, to_port: int, data: bytes = bytes(20)) -> Any:
    """A UDP datagram."""
    return IP(src=source, dst=destination) / UDP(sport=port, dport=to_port) / data


def udp6(source: str, port: int, destination: str, to_port: int, data: bytes = bytes(20)) -> Any:
    """A UDP datagram over IPv6."""
    return IPv6(src=source, dst=destination) / UDP(sport=port, dport=to_port) / data


def ping(source: str, destination: str, identifier: int = 7, *, kind: int = 8) -> Any:
    """An echo request, or with kind 0 its reply."""
    return IP(src=source, dst=destination) / ICMP(type=kind, id=identifier, seq=1) / (b"p" * 32)


def arp(sender: str, target: str, *, mac: str = GUEST_MAC, operation: int = 1) -> bytes:
    """An ARP packet of the guest's."""
    return ether(ARP(op=operation, hwsrc=mac, psrc=sender, pdst=target), destination="ff:ff:ff:ff:ff:ff")

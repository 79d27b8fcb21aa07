"""The spoof guard of one port: what a guest may claim to be.

Invariant: a frame that passes comes from the port's own hardware address and from an address that the port
was given (by our DHCP, or by configuration), and says nothing that only the host may say (DHCP answers,
router advertisements, redirects). Without an address only DHCP, ARP probes and duplicate address detection
pass. On by default; there is no snooping: `addresses` follow our own leases.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Final

from rayos_net.packet import ICMPV6, UDP, Packet

_LINK_LOCAL: Final = 0xFE80 << 112
ANY_SERVER: Final = (
    0xFFFFFFFF  # there is one, whose address is not known: something else keeps others' answers away
)
_DHCP_SERVER: Final = 67
_DHCP_CLIENT: Final = 68
_CHADDR_AT: Final = 8 + 28  # behind the UDP header, 28 bytes into the message
#: Router advertisement, redirect (RFC 4861, 4.2 and 4.5), multicast listener query (RFC 3810, 5.1).
_NO_GUEST_ICMPV6: Final = frozenset((130, 134, 137))
_IGMP: Final = 2
_IGMP_QUERY: Final = 0x11  # RFC 3376, 4.1: who sends it is the querier, and the switches' router


class Spoof(IntEnum):
    """Why the guard drops a frame; 0 is not a reason. Values continue those of rayos_net.packet.Fault."""

    SOURCE_MAC = 32  # not the port's hardware address
    RESERVED_MAC = 33  # to 01:80:c2:…: bridge control (IEEE 802.1D)
    ARP_SENDER = 34  # ARP in another's name, or for the gateway
    SOURCE_ADDRESS = 35  # an address that the port was not given
    DHCP_SERVER = 36  # acts as a DHCP server
    DHCP_CLIENT = 37  # a DHCP message for another hardware address, or in fragments
    ROUTER = 38  # router advertisement, redirect, or a query for multicast listeners
    NEIGHBOUR = 39  # neighbour advertisement for another's address
    DESTINATION_MAC = 40  # to the guest, but not for it


class Guard:
    """The senders that the port with hardware address `mac` may use. `addresses` are IPv4 and IPv6 addresses as
    integers.
    """

    def __init__(
        self, mac: bytes, *, addresses: Iterable[int] = (), addresses6: Iterable[int] = (), server: int = 0
    ) -> None:
        self.mac = mac
        self.server = server  # the only DHCP server that may answer; 0: none is checked
        self.addresses = frozenset(addresses)
        local = _LINK_LOCAL | _interface_id(mac)
        self.addresses6 = frozenset((local, *addresses6))

    def bind(self, addresses: Iterable[int]) -> None:
        """Set the IPv4 addresses that the port has now: after an ACK of ours, or nothing after release or
        expiry.
        """
        self.addresses = frozenset(addresses)

    def check_out(self, frame: bytes, packet: Packet) -> int:
        """0 when the guest may send this frame, else a Spoof."""
        if packet.source_mac != self.mac:
            return Spoof.SOURCE_MAC
        if packet.destination_mac[:5] == b"\x01\x80\xc2\x00\x00":
            return Spoof.RESERVED_MAC
        if packet.version == 4:
            return self._check_ipv4(frame, packet)
        if packet.version == 6:
            return self._check_ipv6(frame, packet)
        return self._check_arp(frame, packet)

    def check_in(self, packet: Packet) -> int:
        """0 when this frame is for the guest, else a Spoof."""
        destination = packet.destination_mac
        if destination != self.mac and not destination[0] & 1:
            return Spoof.DESTINATION_MAC
        is_answer = packet.protocol == UDP and packet.version == 4 and packet.destination_port == _DHCP_CLIENT
        if is_answer and self.server not in (0, ANY_SERVER) and packet.source != self.server:
            return Spoof.DHCP_SERVER
        return 0

    def _check_arp(self, frame: bytes, packet: Packet) -> int:
        if frame[22:28] != self.mac:
            return Spoof.ARP_SENDER
        if packet.source in self.addresses:
            return 0
        return 0 if packet.source == 0 and packet.protocol == 1 else Spoof.ARP_SENDER  # probe (RFC 5227, 1.1)

    def _check_ipv4(self, frame: bytes, packet: Packet) -> int:
        if packet.protocol == UDP and packet.offset == 0:
            if packet.source_port == _DHCP_SERVER or packet.destination_port == _DHCP_CLIENT:
                return Spoof.DHCP_SERVER
            if packet.destination_port == _DHCP_SERVER:
                at = packet.transport + _CHADDR_AT
                if packet.fragment >= 0 or frame[at : at + 6] != self.mac:
                    return Spoof.DHCP_CLIENT
                if packet.source == 0:
                    return 0
        is_igmp = packet.protocol == _IGMP and packet.offset == 0 and packet.transport < packet.end
        if is_igmp and frame[packet.transport] == _IGMP_QUERY:
            return Spoof.ROUTER
        return 0 if packet.source in self.addresses else Spoof.SOURCE_ADDRESS

    def _check_ipv6(self, frame: bytes, packet: Packet) -> int:
        if packet.protocol == ICMPV6 and packet.offset == 0:
            kind = frame[packet.transport]
            if kind in _NO_GUEST_ICMPV6:
                return Spoof.ROUTER
            if kind in (135, 136) and packet.fragment >= 0:
                return Spoof.NEIGHBOUR  # RFC 6980: neighbour discovery is never fragmented
            if kind == 136 and _target(frame, packet) not in self.addresses6:
                return Spoof.NEIGHBOUR
            if packet.source == 0:  # duplicate address detection (RFC 4862, 5.4.2) and MLD reports (RFC 3590)
                is_own = kind == 135 and _target(frame, packet) in self.addresses6
                return 0 if is_own or kind == 143 else Spoof.SOURCE_ADDRESS
        if packet.protocol == UDP and packet.offset == 0 and packet.source_port == 547:
            return Spoof.DHCP_SERVER
        return 0 if packet.source in self.addresses6 else Spoof.SOURCE_ADDRESS


def _target(frame: bytes, packet: Packet) -> int:
    at = packet.transport + 8
    return int.from_bytes(frame[at : at + 16], "big") if at + 16 <= packet.end else -1


def _interface_id(mac: bytes) -> int:
    # RFC 4291, appendix A: the link-local address that Linux makes from a hardware address.
    return int.from_bytes(bytes((mac[0] ^ 2, mac[1], mac[2], 0xFF, 0xFE, mac[3], mac[4], mac[5])), "big")

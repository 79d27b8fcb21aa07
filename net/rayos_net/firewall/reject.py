"""The answer to a rejected packet: a TCP reset or an ICMP "administratively prohibited" (RFC 9293, 3.10.7.1;
RFC 1812, 5.2.7.1; RFC 4443, 3.1).

Invariant: nothing is answered that must not be (RFC 1122, 3.2.2): group addresses, fragments, ICMP errors,
resets.
"""

import struct
from typing import Final

from rayos_net.packet import ETHER_SIZE, ICMP, ICMPV6, TCP, Packet

_IPV4: Final = struct.Struct("!BBHHHBBH4s4s")
_IPV6: Final = struct.Struct("!IHBB16s16s")
_TCP: Final = struct.Struct("!HHIIBBHHH")
_RST: Final = 0x04
_ACK: Final = 0x10
_SYN: Final = 0x02
_FIN: Final = 0x01
_QUOTED_MAX: Final = 548  # RFC 1812, 4.3.2.3: the answer stays within 576 bytes


def answer(frame: bytes, packet: Packet) -> bytes | None:
    """The frame to send back to the sender of `frame`, None when none may be sent."""
    if packet.destination_mac[0] & 1 or packet.fragment >= 0 or packet.version not in (4, 6):
        return None
    at = packet.transport
    if packet.protocol == TCP:
        if frame[at + 13] & _RST:
            return None
        body = _reset(frame, packet)
    elif packet.protocol in (ICMP, ICMPV6) and _is_error(frame[at], packet.version):
        return None
    else:
        quoted = frame[ETHER_SIZE : min(packet.end, ETHER_SIZE + _QUOTED_MAX)]
        kind, code = (3, 13) if packet.version == 4 else (1, 1)
        body = bytes((kind, code, 0, 0, 0, 0, 0, 0)) + quoted
    return _frame(frame, packet, body)


def _reset(frame: bytes, packet: Packet) -> bytes:
    at = packet.transport
    sequence, acknowledged = struct.unpack_from("!II", frame, at + 4)
    flags = frame[at + 13]
    if flags & _ACK:
        return _TCP.pack(packet.destination_port, packet.source_port, acknowledged, 0, 0x50, _RST, 0, 0, 0)
    header = (frame[at + 12] >> 4) * 4
    length = packet.end - at - header + bool(flags & _SYN) + bool(flags & _FIN)
    expected = (sequence + length) & 0xFFFFFFFF
    return _TCP.pack(packet.destination_port, packet.source_port, 0, expected, 0x50, _RST | _ACK, 0, 0, 0)


def _frame(frame: bytes, packet: Packet, body: bytes) -> bytes:
    # In the name of the destination: the guest has no other neighbour who could answer.
    ether = packet.source_mac + packet.destination_mac + frame[12:14]
    size = 4 if packet.version == 4 else 16
    source, destination = packet.destination.to_bytes(size, "big"), packet.source.to_bytes(size, "big")
    protocol = TCP if packet.protocol == TCP else (ICMP if packet.version == 4 else ICMPV6)
    pseudo = b"" if protocol == ICMP else source + destination + struct.pack("!II", len(body), protocol)
    where = 16 if protocol == TCP else 2
    body = body[:where] + checksum(pseudo + body).to_bytes(2, "big") + body[where + 2 :]
    if packet.version == 6:
        return ether + _IPV6.pack(6 << 28, len(body), protocol, 64, source, destination) + body
    header = _IPV4.pack(0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0, source, destination)
    header = header[:10] + checksum(header).to_bytes(2, "big") + header[12:]
    return ether + header + body


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _is_error(kind: int, version: int) -> bool:
    return kind in (3, 4, 5, 11, 12) if version == 4 else kind < 128

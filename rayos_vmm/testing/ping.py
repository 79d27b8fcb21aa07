"""An ICMP echo from the host (RFC 792), without a program to call."""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

import trio

ECHO_REQUEST: Final = 8
ECHO_REPLY: Final = 0
RETRY_S: Final = 1.0


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def request(identifier: int, sequence: int) -> bytes:
    head = struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, identifier, sequence)
    body = head + b"RayOS VMM echo.."
    return body[:2] + struct.pack("!H", _checksum(body)) + body[4:]


async def ping(address: str, *, timeout: float) -> float:
    """Seconds until the first answer from `address`; needs root (a raw socket). Asks once a second.

    Raises:
        TimeoutError: none came within `timeout` seconds.
    """
    identifier = os.getpid() & 0xFFFF
    with trio.move_on_after(timeout):
        with trio.socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            for sequence in range(int(timeout / RETRY_S) + 1):
                sent = trio.current_time()
                await sock.sendto(request(identifier, sequence), (address, 0))
                with trio.move_on_after(RETRY_S):
                    while True:
                        packet, (sender, _) = await sock.recvfrom(2048)
                        offset = 4 * (packet[0] & 15)
                        kind, _, _, who, which = struct.unpack_from("!BBHHH", packet, offset)
                        if (sender, kind, who, which) == (address, ECHO_REPLY, identifier, sequence):
                            return trio.current_time() - sent
    raise TimeoutError(f"{address} did not answer an ICMP echo within {timeout:g} s")

"""Packets between the service, the keeper and the worker: a JSON object, then bytes, in one SOCK_SEQPACKET message.

The kernel keeps the boundaries, so there is nothing to frame; a packet is taken whole or not at all.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from rayos_vmm.errors import GuestGone

#: Data bytes beside the JSON object in one packet; an AF_UNIX socket takes 208 KiB at a time.
MAX_DATA_BYTES: Final = 64 * 1024
MAX_PACKET_BYTES: Final = 128 * 1024

#: The JSON object of a packet: a request's or an answer's fields, by its operation.
Head = dict[str, Any]

#: Counters by device; each kind of device has its own.
Stats = dict[str, Any]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Head).decode


class WorkerError(Exception):
    """The worker refused a request; `code` is for programs, `denied` the operation that the gate did not allow."""

    def __init__(self, code: str, message: str, denied: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.denied = denied


class WorkerGone(GuestGone):
    """No worker answers any more: the VM's keeper has ended."""


def encode(head: Head, data: bytes | memoryview = b"") -> bytes:
    """Errors: ValueError when the packet would exceed MAX_PACKET_BYTES."""
    packet = _encode(head) + b"\n" + data
    if len(packet) > MAX_PACKET_BYTES:
        raise ValueError(f"a packet of {len(packet)} bytes exceeds {MAX_PACKET_BYTES}")
    return packet


def decode(packet: bytes) -> tuple[Head, bytes]:
    """The object and the bytes. Errors: ValueError for what is no packet."""
    head, separator, data = packet.partition(b"\n")
    if not separator:
        raise ValueError(f"a packet of {len(packet)} bytes without its separator")
    try:
        return _decode(head), data
    except msgspec.MsgspecError as error:
        raise ValueError(f"a packet whose head is no JSON object: {error}") from None

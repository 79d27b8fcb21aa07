"""Frames as a pcapng file (draft-ietf-opsawg-pcapng), which tcpdump, Wireshark and scapy read.

Pure. One section, one interface. Times are in nanoseconds since the epoch (if_tsresol 9), the direction is in
epb_flags, and what was lost before a frame in its epb_dropcount.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

LINKTYPE_ETHERNET: Final = 1
_SECTION: Final = 0x0A0D0D0A  # 4.1
_INTERFACE: Final = 1  # 4.2
_STATISTICS: Final = 5  # 4.6
_PACKET: Final = 6  # 4.3
_MAGIC: Final = 0x1A2B3C4D
# 4.2: if_name, if_tsresol; 4.3: epb_flags, epb_dropcount; 4.6: isb_ifrecv, isb_ifdrop
_IF_NAME, _IF_TSRESOL, _EPB_FLAGS, _EPB_DROPCOUNT, _ISB_IFRECV, _ISB_IFDROP = 2, 9, 2, 4, 4, 5
_FRAMING_BYTES: Final = 12  # type, length, length again
_PACKET_HEAD: Final = struct.Struct("<IIIII")
# What a worker tells of a frame (devices/rayos_devices/net/capture.py).
_RECORD: Final = struct.Struct("<QIIQ")
_DENIED: Final = 4
#: 3.5, opt_comment: Wireshark and tshark show it, and filter by it (frame.comment).
_COMMENT: Final = 1
DENIED_COMMENT: Final = b"denied"


@dataclass(frozen=True, slots=True)
class CapturedFrame:
    """One frame: `time_ns` since the epoch, its full length, 1 towards the guest or 2 from it, what was kept of it.

    `is_denied`: it went no further.
    """

    time_ns: int
    length: int
    direction: int
    data: bytes
    is_denied: bool = False


def _block(kind: int, body: bytes) -> bytes:
    length = _FRAMING_BYTES + len(body)
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)


def _options(*options: tuple[int, bytes]) -> bytes:
    packed = [struct.pack("<HH", code, len(value)) + _pad(value) for code, value in options if value]
    return b"".join(packed) + bytes(4) if packed else b""


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def header(name: str, snap: int) -> bytes:
    """Section and interface: how a file begins. `snap` is the most bytes kept of a frame."""
    section = struct.pack("<IHHq", _MAGIC, 1, 0, -1)
    options = _options((_IF_NAME, name.encode()), (_IF_TSRESOL, b"\x09"))
    interface = struct.pack("<HHI", LINKTYPE_ETHERNET, 0, snap) + options
    return _block(_SECTION, section) + _block(_INTERFACE, interface)


def packet(frame: CapturedFrame, lost: int) -> bytes:
    """A frame, and how many were lost since the one before."""
    head = _PACKET_HEAD.pack(
        0, frame.time_ns >> 32, frame.time_ns & 0xFFFFFFFF, len(frame.data), frame.length
    )
    flags = struct.pack("<I", frame.direction)
    count = struct.pack("<Q", lost) if lost else b""
    options = _options(
        (_COMMENT, DENIED_COMMENT if frame.is_denied else b""), (_EPB_FLAGS, flags), (_EPB_DROPCOUNT, count)
    )
    return _block(_PACKET, head + _pad(frame.data) + options)


def statistics(time_ns: int, received: int, lost: int) -> bytes:
    """How a file ends: frames that passed, and those of them that are not in it."""
    head = struct.pack("<III", 0, time_ns >> 32, time_ns & 0xFFFFFFFF)
    counts = ((_ISB_IFRECV, received), (_ISB_IFDROP, lost))
    return _block(_STATISTICS, head + _options(*((code, struct.pack("<Q", value)) for code, value in counts)))


def unpack_records(data: bytes, offset_ns: int) -> Iterator[CapturedFrame]:
    """The frames that a worker tells of; `offset_ns` leads from its clock to the epoch.

    Errors: ValueError for what is no record: a worker that was taken over may say anything.
    """
    at = 0
    while at < len(data):
        if len(data) - at < _RECORD.size:
            raise ValueError(f"{len(data) - at} bytes of a record of {_RECORD.size} and more")
        time_ns, kept, length, direction = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if kept > min(length, len(data) - at) or direction not in (1, 2, 1 | _DENIED, 2 | _DENIED):
            raise ValueError(f"a record of {kept} of {length} bytes, direction {direction}")
        moment = (time_ns + offset_ns) & 0xFFFF_FFFF_FFFF_FFFF
        yield CapturedFrame(
            moment, length, direction & ~_DENIED, data[at : at + kept], bool(direction & _DENIED)
        )
        at += (kept + 7) & ~7


class Tally:
    """Counts frames and losses of a file that comes in pieces."""

    def __init__(self) -> None:
        self.frames = 0
        self.lost = 0
        self.size = 0
        self._rest = b""

    def add(self, piece: bytes) -> None:
        """Errors: ValueError for what is no block."""
        self.size += len(piece)
        self._rest += piece
        at = 0
        while len(self._rest) - at >= 8:
            kind, length = struct.unpack_from("<II", self._rest, at)
            if length < _FRAMING_BYTES or length % 4:
                raise ValueError(f"a pcapng block of {length} bytes")
            if len(self._rest) - at < length:
                break
            if kind == _PACKET:
                self.frames += 1
                self.lost += self._lost(at + 8, at + length - 4)
            at += length
        self._rest = self._rest[at:]

    def _lost(self, start: int, end: int) -> int:
        kept: int = _PACKET_HEAD.unpack_from(self._rest, start)[3]
        at = start + _PACKET_HEAD.size + kept + -kept % 4
        while at + 4 <= end:
            code, size = struct.unpack_from("<HH", self._rest, at)
            if code == _EPB_DROPCOUNT and size == 8:
                return int.from_bytes(self._rest[at + 4 : at + 12], "little")
            at += 4 + size + -size % 4
        return 0

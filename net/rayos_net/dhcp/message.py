"""The DHCP message: fixed BOOTP header, magic cookie, options (RFC 2131, 2; RFC 2132, 2 and 9.3).

Invariant: a decoded message is an Ethernet one (htype 1, hlen 6), its options are checked and joined
(overload, RFC 3396), and an encoded one is 300 bytes or more (RFC 1542, 2.1) and not above the size given.

Addresses are plain integers and the message is a NamedTuple, since a server handles thousands a second and an
``ipaddress`` object or a frozen dataclass costs more than all the parsing.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from rayos_net.dhcp import option
from rayos_net.dhcp.option import BadOption, Code

BOOT_REQUEST: Final = 1
BOOT_REPLY: Final = 2
ETHERNET: Final = 1  # htype (RFC 1700)
BROADCAST_FLAG: Final = 0x8000  # RFC 2131, figure 2
COOKIE: Final = b"\x63\x82\x53\x63"  # RFC 2131, 3

_HEADER: Final = struct.Struct("!BBBBIHHIIII16s64s128s4s")
HEADER_SIZE: Final = _HEADER.size  # 236 bytes of BOOTP and 4 of cookie
assert HEADER_SIZE == 240
MINIMUM_SIZE: Final = 300  # RFC 1542, 2.1: some relays and clients drop less
DEFAULT_MAX_SIZE: Final = 548  # RFC 2132, 9.10: 576 bytes of IP less 20 of IP and 8 of UDP header
IP_UDP_SIZE: Final = 28  # option 57 counts them (RFC 2131, 2: "DHCP message" means the datagram)
DATAGRAM_MAX: Final = 4096  # ours: no client sends more; bounds the work for one datagram
SNAME_SIZE: Final = 64
FILE_SIZE: Final = 128


class MessageType(IntEnum):
    """RFC 2132, 9.6."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class BadMessage(ValueError):
    """The remote side sent a datagram that is no DHCP message for Ethernet; the text says what was seen."""


class Message(NamedTuple):
    """One DHCP message. Addresses are integers, `chaddr` is 6 bytes, `sname` and `file` are without padding."""

    op: int
    hops: int
    xid: int
    secs: int
    flags: int
    ciaddr: int
    yiaddr: int
    siaddr: int
    giaddr: int
    chaddr: bytes
    sname: bytes
    file: bytes
    options: dict[int, bytes]

    @property
    def type(self) -> int | None:
        """The DHCP message type as a number, None for plain BOOTP. It may be one that we do not know."""
        return option.u8(self.options.get(53))

    def encode(self, max_size: int = DEFAULT_MAX_SIZE) -> bytes:
        """The datagram, options in the order of the mapping, at most `max_size` bytes. See `encode`."""
        return encode(self, [option.encode(code, value) for code, value in self.options.items()], max_size)


def decode(data: bytes) -> Message:
    """The message in a datagram.

    Raises BadMessage when it is shorter than 240 or longer than 4096 bytes, not op 1 or 2, not Ethernet,
    without the cookie, or when an option area breaks the format.
    """
    size = len(data)
    if not HEADER_SIZE <= size <= DATAGRAM_MAX:
        raise BadMessage(f"{size} bytes; a message has {HEADER_SIZE}..{DATAGRAM_MAX}")
    (op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr, chaddr, sname, file, cookie) = (
        _HEADER.unpack_from(data)
    )
    if op != BOOT_REQUEST and op != BOOT_REPLY:
        raise BadMessage(f"op {op}; 1 and 2 are defined")
    if htype != ETHERNET or hlen != 6:
        raise BadMessage(f"hardware type {htype} with {hlen} bytes; only Ethernet (1, 6) is served")
    if cookie != COOKIE:
        raise BadMessage(f"cookie {cookie.hex()}; it must be {COOKIE.hex()}")
    options: dict[int, bytes] = {}
    try:
        option.scan(data, options, HEADER_SIZE)
        overload = options.pop(Code.OVERLOAD, None)
        if overload is not None:
            sname, file = _read_overload(overload, sname, file, options)
    except BadOption as error:
        raise BadMessage(str(error)) from None
    return Message(
        op,
        hops,
        xid,
        secs,
        flags,
        ciaddr,
        yiaddr,
        siaddr,
        giaddr,
        chaddr[:6],
        sname.split(b"\0", 1)[0],
        file.split(b"\0", 1)[0],
        options,
    )


def encode(message: Message, options: Sequence[bytes], max_size: int) -> bytes:
    """The datagram for the header fields of `message` and the encoded `options`, at most `max_size` bytes.

    What does not fit in the options area goes to `file`, then `sname`, if those are empty (RFC 2131, 4.1);
    what fits nowhere is left out. Put the necessary ones first.
    """
    room = max(max_size, MINIMUM_SIZE) - HEADER_SIZE - 1  # the end option
    sname, file = message.sname, message.file
    area = b"".join(options)
    if len(area) > room:
        area, sname, file = _fit(options, room, sname, file)
    header = _HEADER.pack(
        message.op,
        ETHERNET,
        6,
        message.hops,
        message.xid,
        message.secs,
        message.flags,
        message.ciaddr,
        message.yiaddr,
        message.siaddr,
        message.giaddr,
        message.chaddr,
        sname,
        file,
        COOKIE,
    )
    return (header + area + b"\xff").ljust(MINIMUM_SIZE, b"\0")


def _fit(options: Sequence[bytes], room: int, sname: bytes, file: bytes) -> tuple[bytes, bytes, bytes]:
    parts: list[bytes] = []
    late: list[bytes] = []
    total = 0
    for encoded in options:
        if not late and total + len(encoded) <= room:
            parts.append(encoded)
            total += len(encoded)
        else:
            late.append(encoded)
    while parts and total + 3 > room:  # the overload option itself
        last = parts.pop()
        total -= len(last)
        late.insert(0, last)
    flag, file, sname = _overload(late, file, sname)
    if flag:
        parts.append(bytes((Code.OVERLOAD, 1, flag)))
    return b"".join(parts), sname, file


def _read_overload(
    overload: bytes, sname: bytes, file: bytes, options: dict[int, bytes]
) -> tuple[bytes, bytes]:
    # RFC 2131, 4.1: first options, then file, then sname; an overload inside those has no meaning.
    flag = option.u8(overload)
    if flag not in (1, 2, 3):
        raise BadOption(f"overload value {overload.hex() or 'empty'}; 1, 2 and 3 are defined")
    if flag & 1:
        option.scan(file, options)
        file = b""
    if flag & 2:
        option.scan(sname, options)
        sname = b""
    options.pop(Code.OVERLOAD, None)
    return sname, file


def _overload(late: list[bytes], file: bytes, sname: bytes) -> tuple[int, bytes, bytes]:
    flag = 0
    for bit, size in ((1, FILE_SIZE), (2, SNAME_SIZE)):
        if (file if bit == 1 else sname) or not late:
            continue
        area = b""
        rest = []
        for encoded in late:
            if len(area) + len(encoded) < size:
                area += encoded
            else:
                rest.append(encoded)
        if area:
            flag |= bit
            if bit == 1:
                file = area + b"\xff"
            else:
                sname = area + b"\xff"
        late = rest
    return flag, file, sname

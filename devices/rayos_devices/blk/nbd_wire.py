"""NBD on the wire (the Network Block Device protocol, doc/proto.md of the nbd project): magics, options, commands."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

#: "Handshake phase", fixed newstyle: NBDMAGIC, IHAVEOPT, handshake flags u16.
GREETING: Final = struct.Struct(">QQH")
MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
#: IHAVEOPT, option u32, length u32.
OPTION: Final = struct.Struct(">QII")
#: Reply magic, option u32, reply type u32, length u32.
OPTION_REPLY: Final = struct.Struct(">QIII")
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
CLIENT_FLAGS: Final = struct.Struct(">I")
#: Size u64, transmission flags u16; 124 zeros follow for a client that does not say NO_ZEROES.
EXPORT: Final = struct.Struct(">QH")
EXPORT_PADDING: Final = 124
#: "NBD_INFO_EXPORT": type u16, size u64, flags u16. "NBD_INFO_BLOCK_SIZE": type u16, three u32.
INFO_EXPORT: Final = struct.Struct(">HQH")
INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
#: "Request message": magic u32, flags u16, type u16, cookie u64, offset u64, length u32.
REQUEST: Final = struct.Struct(">IHHQQI")
REQUEST_MAGIC: Final = 0x25609513
#: "Simple reply message": magic u32, error u32, cookie u64.
REPLY: Final = struct.Struct(">IIQ")
REPLY_MAGIC: Final = 0x67446698

#: The most data of one request that every client may count on ("Terminating the transmission phase").
MAX_PAYLOAD_BYTES: Final = 32 << 20
#: The most data of one option: a name of 4096 bytes and a list of information requests.
MAX_OPTION_BYTES: Final = 8192


class HandshakeFlag(IntFlag):
    """Of the server's greeting and of the client's answer."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """ "Option types"."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7


class OptionReply(IntEnum):
    """ "Option reply types"; the errors have bit 31."""

    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 1 << 31 | 1
    ERR_INVALID = 1 << 31 | 3
    ERR_UNKNOWN = 1 << 31 | 6


class Info(IntEnum):
    """ "NBD_OPT_GO" information types."""

    EXPORT = 0
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """The abilities of an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6


class Command(IntEnum):
    """ "Request types"."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


class CommandFlag(IntFlag):
    """Of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1


class Error(IntEnum):
    """ "Error values"; they are those of Linux."""

    OK = 0
    EPERM = 1
    EIO = 5
    EINVAL = 22

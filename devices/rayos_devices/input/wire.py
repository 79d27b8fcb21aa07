"""virtio-input on the wire (VIRTIO 1.3, 5.8): the event, the configuration space, evdev's types and axes."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

EVENT_QUEUE: Final = 0
STATUS_QUEUE: Final = 1

#: 5.8.6: type le16, code le16, value le32 (signed for evdev).
EVENT: Final = struct.Struct("<HHi")

#: 5.8.4: select u8, subsel u8, size u8, 5 reserved, then 128 bytes of whatever was selected.
CONFIG_HEADER: Final = struct.Struct("<BBB5x")
PAYLOAD_BYTES: Final = 128
CONFIG_BYTES: Final = CONFIG_HEADER.size + PAYLOAD_BYTES
#: 5.8.4, virtio_input_absinfo: min, max, fuzz, flat, res, le32 each.
ABS_INFO: Final = struct.Struct("<iiIII")
#: 5.8.4, virtio_input_devids: bustype, vendor, product, version, le16 each.
DEVICE_IDS: Final = struct.Struct("<HHHH")


class Select(IntEnum):
    """5.8.4."""

    UNSET = 0x00
    ID_NAME = 0x01
    ID_SERIAL = 0x02
    ID_DEVIDS = 0x03
    PROP_BITS = 0x10
    EV_BITS = 0x11
    ABS_INFO = 0x12


class EventType(IntEnum):
    """linux/input-event-codes.h."""

    SYN = 0x00
    KEY = 0x01
    REL = 0x02
    ABS = 0x03
    LED = 0x11
    REP = 0x14


SYN_REPORT: Final = 0

BUS_VIRTUAL: Final = 0x06


class Property(IntEnum):
    """linux/input-event-codes.h, INPUT_PROP_*."""

    POINTER = 0
    DIRECT = 1


class Rel(IntEnum):
    """Relative axes."""

    X = 0x00
    Y = 0x01
    HWHEEL = 0x06
    WHEEL = 0x08


class Abs(IntEnum):
    """Absolute axes."""

    X = 0x00
    Y = 0x01
    MT_SLOT = 0x2F
    MT_POSITION_X = 0x35
    MT_POSITION_Y = 0x36
    MT_TRACKING_ID = 0x39


class Led(IntEnum):
    """Lights of a keyboard."""

    NUM = 0
    CAPS = 1
    SCROLL = 2


class Rep(IntEnum):
    """Parameters of key repetition; the guest repeats by itself."""

    DELAY = 0
    PERIOD = 1


def pack_bits(codes: frozenset[int]) -> bytes:
    """A bitmap as short as it can be, bit `n` of byte `n // 8` first."""
    bits = 0
    for code in codes:
        bits |= 1 << code
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")

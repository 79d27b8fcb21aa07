"""virtio-blk on the wire (VIRTIO 1.3, 5.2): requests, status bytes, configuration space."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

SECTOR_BYTES: Final = 512
#: 5.2.6: type le32, reserved le32, sector le64.
HEADER: Final = struct.Struct("<IIQ")
#: 5.2.6.2: a string of 20 bytes, NUL-padded.
ID_BYTES: Final = 20
#: 5.2.6: sector le64, num_sectors le32, flags le32.
SEGMENT: Final = struct.Struct("<QII")
SEGMENT_FLAG_UNMAP: Final = 1


#: 5.2.4: where the configuration space has `writeback`, the only field that is the driver's.
WRITEBACK_OFFSET: Final = 32


class RequestType(IntEnum):
    """5.2.6."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Status(IntEnum):
    """5.2.6."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class BlkFeature(IntFlag):
    """5.2.3. Not SIZE_MAX: a buffer may have any size here, and QEMU 11.1.3 does not show it (ARCHITECTURE.md)."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


@dataclass(frozen=True, slots=True)
class Config:
    """5.2.4, all sizes as the fields have them; what is not set here is zero."""

    capacity_sectors: int
    seg_max: int
    block_size_bytes: int
    physical_block_exponent: int
    optimal_io_blocks: int
    queues: int
    max_discard_sectors: int
    max_discard_segments: int
    discard_alignment_sectors: int
    max_write_zeroes_sectors: int
    max_write_zeroes_segments: int
    writeback: bool = True

    #: capacity q, size_max I, seg_max I, geometry 4, blk_size I, topology BBHI, writeback B, pad, queues H,
    #: discard III, write zeroes II, may_unmap B, pad 3.
    _LAYOUT = struct.Struct("<QII4xIBBHIBxHIIIIIB3x")

    def pack(self) -> bytes:
        return self._LAYOUT.pack(
            self.capacity_sectors,
            0,
            self.seg_max,
            self.block_size_bytes,
            self.physical_block_exponent,
            0,
            1,
            self.optimal_io_blocks,
            self.writeback,
            self.queues,
            self.max_discard_sectors,
            self.max_discard_segments,
            self.discard_alignment_sectors,
            self.max_write_zeroes_sectors,
            self.max_write_zeroes_segments,
            1,
        )

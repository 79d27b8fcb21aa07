"""virtio-gpu commands and answers: bytes into values and back (VIRTIO 1.3, 5.7.6).

Every command begins with a 24-byte control header; so does every answer, which repeats the command's fence.
Nothing here is checked against a resource: that is the backend's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple, Self

#: VIRTIO 1.3, 5.7.6.8: VIRTIO_GPU_MAX_SCANOUTS.
MAX_SCANOUTS: Final = 16
#: An EDID answer always has this much room (5.7.6.8, GET_EDID).
MAX_EDID_BYTES: Final = 1024
#: The side of the cursor resource, in pixels (5.7.6.10).
CURSOR_SIDE: Final = 64
#: All eight 2D formats have four bytes a pixel.
PIXEL_BYTES: Final = 4

FLAG_FENCE: Final = 1 << 0


class GpuFeature(IntFlag):
    """5.7.3 *Feature bits*: only what works here."""

    EDID = 1 << 1


class Command(IntEnum):
    """5.7.6.7 *Device Operation: Request header*, enum virtio_gpu_ctrl_type."""

    GET_DISPLAY_INFO = 0x0100  # 5.7.6.8
    RESOURCE_CREATE_2D = 0x0101
    RESOURCE_UNREF = 0x0102
    SET_SCANOUT = 0x0103
    RESOURCE_FLUSH = 0x0104
    TRANSFER_TO_HOST_2D = 0x0105
    RESOURCE_ATTACH_BACKING = 0x0106
    RESOURCE_DETACH_BACKING = 0x0107
    GET_CAPSET_INFO = 0x0108  # 5.7.6.9, needs VIRGL or CONTEXT_INIT: refused
    GET_CAPSET = 0x0109
    GET_EDID = 0x010A  # 5.7.6.8, EDID
    UPDATE_CURSOR = 0x0300  # 5.7.6.10
    MOVE_CURSOR = 0x0301


class Answer(IntEnum):
    """5.7.6.7: success and error answers."""

    OK_NODATA = 0x1100
    OK_DISPLAY_INFO = 0x1101
    OK_EDID = 0x1104
    ERR_UNSPEC = 0x1200
    ERR_OUT_OF_MEMORY = 0x1201
    ERR_INVALID_SCANOUT_ID = 0x1202
    ERR_INVALID_RESOURCE_ID = 0x1203
    ERR_INVALID_CONTEXT_ID = 0x1204
    ERR_INVALID_PARAMETER = 0x1205


class Format(IntEnum):
    """5.7.6.8 *RESOURCE_CREATE_2D*: the letters name the bytes in memory order."""

    B8G8R8A8 = 1
    B8G8R8X8 = 2
    A8R8G8B8 = 3
    X8R8G8B8 = 4
    R8G8B8A8 = 67
    X8B8G8R8 = 68
    A8B8G8R8 = 121
    R8G8B8X8 = 134


class Rect(NamedTuple):
    """struct virtio_gpu_rect, in pixels. All fields are u32, so sums here cannot wrap (Python's integers)."""

    x: int
    y: int
    width: int
    height: int

    @property
    def right(self) -> int:
        return self.x + self.width

    @property
    def bottom(self) -> int:
        return self.y + self.height

    def is_within(self, width: int, height: int) -> bool:
        """Not empty, and wholly inside a `width` by `height` picture."""
        return (
            self.width > 0
            and self.height > 0
            and self.x + self.width <= width
            and self.y + self.height <= height
        )

    def intersection(self, other: Rect) -> Rect | None:
        """The common part; None when there is none."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        width, height = min(self.right, other.right) - x, min(self.bottom, other.bottom) - y
        return Rect(x, y, width, height) if width > 0 and height > 0 else None

    def union(self, other: Rect) -> Rect:
        """The smallest rectangle that holds both."""
        x, y = min(self.x, other.x), min(self.y, other.y)
        return Rect(x, y, max(self.right, other.right) - x, max(self.bottom, other.bottom) - y)


@dataclass(frozen=True, slots=True)
class Header:
    """struct virtio_gpu_ctrl_hdr (5.7.6.7): type, flags, fence_id, ctx_id, ring_idx and padding."""

    kind: int
    flags: int = 0
    fence_id: int = 0
    context_id: int = 0

    STRUCT = struct.Struct("<IIQI4x")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.STRUCT.unpack_from(data))

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.kind, self.flags, self.fence_id, self.context_id)

    def answer(self, kind: Answer) -> bytes:
        """The header of the answer: a fenced command's fence and context come back (5.7.6.7)."""
        if self.flags & FLAG_FENCE:
            return self.STRUCT.pack(kind, FLAG_FENCE, self.fence_id, self.context_id)
        return self.STRUCT.pack(kind, 0, 0, 0)


HEADER_BYTES: Final = Header.STRUCT.size


@dataclass(frozen=True, slots=True)
class ResourceCreate2d:
    """struct virtio_gpu_resource_create_2d, after its header."""

    resource_id: int
    format: int
    width: int
    height: int

    STRUCT = struct.Struct("<IIII")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.STRUCT.unpack_from(data, HEADER_BYTES))

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.resource_id, self.format, self.width, self.height)


@dataclass(frozen=True, slots=True)
class ResourceId:
    """The one field of RESOURCE_UNREF and RESOURCE_DETACH_BACKING, and GET_EDID's scanout; then padding."""

    value: int

    STRUCT = struct.Struct("<I4x")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.STRUCT.unpack_from(data, HEADER_BYTES))

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.value)


@dataclass(frozen=True, slots=True)
class SetScanout:
    """struct virtio_gpu_set_scanout, after its header; resource 0 switches the scanout off."""

    rect: Rect
    scanout_id: int
    resource_id: int

    STRUCT = struct.Struct("<IIIIII")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        x, y, width, height, scanout_id, resource_id = cls.STRUCT.unpack_from(data, HEADER_BYTES)
        return cls(Rect(x, y, width, height), scanout_id, resource_id)

    def pack(self) -> bytes:
        return self.STRUCT.pack(*self.rect, self.scanout_id, self.resource_id)


@dataclass(frozen=True, slots=True)
class ResourceFlush:
    """struct virtio_gpu_resource_flush, after its header."""

    rect: Rect
    resource_id: int

    STRUCT = struct.Struct("<IIIII4x")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        x, y, width, height, resource_id = cls.STRUCT.unpack_from(data, HEADER_BYTES)
        return cls(Rect(x, y, width, height), resource_id)

    def pack(self) -> bytes:
        return self.STRUCT.pack(*self.rect, self.resource_id)


@dataclass(frozen=True, slots=True)
class TransferToHost2d:
    """struct virtio_gpu_transfer_to_host_2d, after its header; `offset` is in bytes of the backing."""

    rect: Rect
    offset: int
    resource_id: int

    STRUCT = struct.Struct("<IIIIQI4x")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        x, y, width, height, offset, resource_id = cls.STRUCT.unpack_from(data, HEADER_BYTES)
        return cls(Rect(x, y, width, height), offset, resource_id)

    def pack(self) -> bytes:
        return self.STRUCT.pack(*self.rect, self.offset, self.resource_id)


@dataclass(frozen=True, slots=True)
class AttachBacking:
    """struct virtio_gpu_resource_attach_backing, after its header; `entries` MEMORY_ENTRYs follow."""

    resource_id: int
    entries: int

    STRUCT = struct.Struct("<II")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.STRUCT.unpack_from(data, HEADER_BYTES))

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.resource_id, self.entries)


#: struct virtio_gpu_mem_entry: guest address u64, length u32, padding u32.
MEMORY_ENTRY: Final = struct.Struct("<QI4x")
#: Where the entries of an ATTACH_BACKING begin in its command.
ENTRIES_OFFSET: Final = HEADER_BYTES + AttachBacking.STRUCT.size


@dataclass(frozen=True, slots=True)
class UpdateCursor:
    """struct virtio_gpu_update_cursor, after its header; MOVE_CURSOR uses scanout and position alone."""

    scanout_id: int
    x: int
    y: int
    resource_id: int
    hot_x: int
    hot_y: int

    STRUCT = struct.Struct("<III4xIII4x")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.STRUCT.unpack_from(data, HEADER_BYTES))

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.scanout_id, self.x, self.y, self.resource_id, self.hot_x, self.hot_y)


#: struct virtio_gpu_config (5.7.4): events_read, events_clear, num_scanouts, num_capsets, then blob_alignment
#: (read by QEMU 11; 0 since blobs are not offered).
CONFIG: Final = struct.Struct("<IIIII")

#: struct virtio_gpu_display_one (5.7.6.8): rect, enabled, flags.
DISPLAY_ONE: Final = struct.Struct("<IIIIII")
#: RESP_OK_DISPLAY_INFO: a header and one entry a possible scanout = 408.
DISPLAY_INFO_BYTES: Final = HEADER_BYTES + MAX_SCANOUTS * DISPLAY_ONE.size

#: What follows the header of RESP_OK_EDID: size, padding; then MAX_EDID_BYTES.
EDID_SIZE: Final = struct.Struct("<I4x")
#: RESP_OK_EDID = 1056.
EDID_BYTES: Final = HEADER_BYTES + EDID_SIZE.size + MAX_EDID_BYTES

#: The longest command beside ATTACH_BACKING, whose entries are read apart.
MAX_COMMAND_BYTES: Final = HEADER_BYTES + 32

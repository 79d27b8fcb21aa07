"""vhost-user messages: bytes into values and back (QEMU, docs/interop/vhost-user.rst).

A message is a 12-byte header (request, flags, size; native order, little-endian here) and `size` bytes of payload;
descriptors travel beside its first byte. Nothing here trusts a size: every payload is checked against its request.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Final

from rayos_devices.errors import ProtocolError
from rayos_devices.virtio.memory import MAX_REGIONS, RegionSpec

HEADER: Final = struct.Struct("<III")
VERSION: Final = 0x1
FLAG_VERSION_MASK: Final = 0x3
FLAG_REPLY: Final = 1 << 2
FLAG_NEED_REPLY: Final = 1 << 3

#: The largest payload any request here has: a memory table of MAX_REGIONS regions, or a 256-byte config space.
MAX_PAYLOAD_BYTES: Final = 4096
#: Descriptors one message may carry: a memory table has one a region.
MAX_FDS: Final = MAX_REGIONS

U64: Final = struct.Struct("<Q")
VRING_STATE: Final = struct.Struct("<II")
#: SET_LOG_BASE: size, offset.
LOG_BASE: Final = struct.Struct("<QQ")
#: SET_VRING_ADDR: `log` is the used ring's guest address.
VRING_F_LOG: Final = 1
VRING_ADDRESS: Final = struct.Struct("<IIQQQQ")
MEMORY_REGION: Final = struct.Struct("<QQQQ")
MEMORY_HEADER: Final = struct.Struct("<II")
CONFIG_HEADER: Final = struct.Struct("<III")
#: QEMU: VHOST_USER_MAX_CONFIG_SIZE.
MAX_CONFIG_BYTES: Final = 256

#: SET_VRING_KICK/CALL/ERR: the low byte is the queue, bit 8 says that no descriptor came.
VRING_INDEX_MASK: Final = 0xFF
VRING_NO_FD: Final = 1 << 8


class FrontendRequest(IntEnum):
    """Front-end message types."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendRequest(IntEnum):
    """Back-end message types: what we ask the frontend, on a socket of its own (SET_BACKEND_REQ_FD)."""

    CONFIG_CHANGE = 2


class ProtocolFeature(IntFlag):
    """VHOST_USER_PROTOCOL_F_*: only those that work here."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


#: Payload bytes a request must have; requests with a variable payload have a range.
_SIZES: Final[dict[FrontendRequest, tuple[int, int]]] = {
    FrontendRequest.GET_FEATURES: (0, 0),
    FrontendRequest.SET_FEATURES: (8, 8),
    FrontendRequest.SET_OWNER: (0, 0),
    FrontendRequest.RESET_OWNER: (0, 0),
    FrontendRequest.SET_MEM_TABLE: (8, 8 + 32 * MAX_REGIONS),
    FrontendRequest.SET_LOG_BASE: (16, 16),
    FrontendRequest.SET_VRING_NUM: (8, 8),
    FrontendRequest.SET_VRING_ADDR: (40, 40),
    FrontendRequest.SET_VRING_BASE: (8, 8),
    FrontendRequest.GET_VRING_BASE: (8, 8),
    FrontendRequest.SET_VRING_KICK: (8, 8),
    FrontendRequest.SET_VRING_CALL: (8, 8),
    FrontendRequest.SET_VRING_ERR: (8, 8),
    FrontendRequest.GET_PROTOCOL_FEATURES: (0, 0),
    FrontendRequest.SET_PROTOCOL_FEATURES: (8, 8),
    FrontendRequest.GET_QUEUE_NUM: (0, 0),
    FrontendRequest.SET_VRING_ENABLE: (8, 8),
    FrontendRequest.NET_SET_MTU: (8, 8),
    FrontendRequest.SET_BACKEND_REQ_FD: (0, 0),
    FrontendRequest.GET_CONFIG: (12, 12 + MAX_CONFIG_BYTES),
    FrontendRequest.SET_CONFIG: (12, 12 + MAX_CONFIG_BYTES),
    FrontendRequest.GPU_SET_SOCKET: (0, 0),
    FrontendRequest.RESET_DEVICE: (0, 0),
    FrontendRequest.GET_MAX_MEM_SLOTS: (0, 0),
    FrontendRequest.ADD_MEM_REG: (40, 40),
    FrontendRequest.REM_MEM_REG: (40, 40),
    FrontendRequest.SET_STATUS: (8, 8),
    FrontendRequest.GET_STATUS: (0, 0),
}

#: Descriptors a request may bring; every other brings none.
_FDS: Final[dict[FrontendRequest, tuple[int, int]]] = {
    FrontendRequest.SET_MEM_TABLE: (0, MAX_REGIONS),
    FrontendRequest.SET_LOG_BASE: (1, 1),
    FrontendRequest.SET_VRING_KICK: (0, 1),
    FrontendRequest.SET_VRING_CALL: (0, 1),
    FrontendRequest.SET_VRING_ERR: (0, 1),
    FrontendRequest.SET_BACKEND_REQ_FD: (1, 1),
    FrontendRequest.GPU_SET_SOCKET: (1, 1),
    FrontendRequest.ADD_MEM_REG: (1, 1),
    # QEMU sends the region's descriptor along; it is of no use and is closed.
    FrontendRequest.REM_MEM_REG: (0, 1),
}

#: Requests that have an answer of their own, whatever NEED_REPLY says.
ANSWERED: Final[frozenset[FrontendRequest]] = frozenset(
    {
        FrontendRequest.GET_FEATURES,
        FrontendRequest.SET_LOG_BASE,
        FrontendRequest.GET_VRING_BASE,
        FrontendRequest.GET_PROTOCOL_FEATURES,
        FrontendRequest.GET_QUEUE_NUM,
        FrontendRequest.GET_CONFIG,
        FrontendRequest.GET_MAX_MEM_SLOTS,
        FrontendRequest.GET_STATUS,
    }
)


@dataclass(frozen=True, slots=True)
class Message:
    """One request as received. `fds` belong to whoever holds the message until they are taken out."""

    request: FrontendRequest
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def needs_reply(self) -> bool:
        return bool(self.flags & FLAG_NEED_REPLY)

    def pack(self) -> bytes:
        return HEADER.pack(self.request, self.flags, len(self.payload)) + self.payload


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: the request is known, its size and flags are allowed."""

    request: FrontendRequest
    flags: int
    size: int

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Errors: ProtocolError for an unknown request, a wrong version, or a size its request cannot have."""
        number, flags, size = HEADER.unpack(data)
        if flags & FLAG_VERSION_MASK != VERSION:
            raise ProtocolError(f"message version {flags & FLAG_VERSION_MASK}: version {VERSION} is spoken")
        if flags & FLAG_REPLY:
            raise ProtocolError(f"a reply (flags {flags:#x}) where a request was expected")
        try:
            request = FrontendRequest(number)
        except ValueError:
            raise ProtocolError(f"unknown request {number}") from None
        least, most = _SIZES[request]
        if not least <= size <= most:
            raise ProtocolError(
                f"{request.name} with a payload of {size} bytes: {least} to {most} are allowed"
            )
        return cls(request, flags, size)

    @classmethod
    def unpack_reply(cls, data: bytes) -> Header:
        """As `unpack`, for what a backend answers. Errors: ProtocolError when it is no answer."""
        number, flags, size = HEADER.unpack(data)
        if not flags & FLAG_REPLY or size > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"no reply: request {number}, flags {flags:#x}, {size} bytes")
        try:
            return cls(FrontendRequest(number), flags, size)
        except ValueError:
            raise ProtocolError(f"a reply to unknown request {number}") from None

    def check_fds(self, count: int) -> None:
        least, most = (0, 0) if self.flags & FLAG_REPLY else _FDS.get(self.request, (0, 0))
        if not least <= count <= most:
            raise ProtocolError(
                f"{self.request.name} with {count} descriptors: {least} to {most} are allowed"
            )


def pack_reply(request: FrontendRequest, payload: bytes) -> bytes:
    """The answer to a request: same number, version and reply bit."""
    return HEADER.pack(request, VERSION | FLAG_REPLY, len(payload)) + payload


def pack_request(request: FrontendRequest, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """A front-end message, as a frontend (tests, the keeper's replay) sends it."""
    return HEADER.pack(request, VERSION | (FLAG_NEED_REPLY if need_reply else 0), len(payload)) + payload


def pack_backend_request(request: BackendRequest) -> bytes:
    """A back-end message without payload that wants no reply."""
    return HEADER.pack(request, VERSION, 0)


@dataclass(frozen=True, slots=True)
class VringAddress:
    """SET_VRING_ADDR: user addresses of the three areas; `log` is the used ring's guest address, if flags say so."""

    index: int
    flags: int
    descriptors: int
    used: int
    avail: int
    log: int = 0

    @classmethod
    def unpack(cls, payload: bytes) -> VringAddress:
        return cls(*VRING_ADDRESS.unpack(payload))

    def pack(self) -> bytes:
        return VRING_ADDRESS.pack(self.index, self.flags, self.descriptors, self.used, self.avail, self.log)


@dataclass(frozen=True, slots=True)
class ConfigAccess:
    """GET_CONFIG and SET_CONFIG: `size` bytes of config space from `offset`."""

    offset: int
    size: int
    flags: int
    data: bytes

    @classmethod
    def unpack(cls, payload: bytes) -> ConfigAccess:
        offset, size, flags = CONFIG_HEADER.unpack_from(payload)
        data = payload[CONFIG_HEADER.size :]
        if size > MAX_CONFIG_BYTES or offset + size > MAX_CONFIG_BYTES or size != len(data):
            raise ProtocolError(
                f"config access of {size} bytes at {offset} with {len(data)} bytes of data: "
                f"equal sizes up to {MAX_CONFIG_BYTES} are allowed"
            )
        return cls(offset, size, flags, data)

    def pack(self) -> bytes:
        return CONFIG_HEADER.pack(self.offset, self.size, self.flags) + self.data


def unpack_memory_table(payload: bytes) -> list[RegionSpec]:
    """SET_MEM_TABLE's regions."""
    count, _ = MEMORY_HEADER.unpack_from(payload)
    if count > MAX_REGIONS or len(payload) < MEMORY_HEADER.size + count * MEMORY_REGION.size:
        raise ProtocolError(
            f"a memory table of {count} regions in {len(payload)} bytes: at most {MAX_REGIONS} are allowed"
        )
    return [_region(payload, MEMORY_HEADER.size + index * MEMORY_REGION.size) for index in range(count)]


def unpack_memory_region(payload: bytes) -> RegionSpec:
    """ADD_MEM_REG's and REM_MEM_REG's region, behind eight bytes of padding."""
    return _region(payload, 8)


def _region(payload: bytes, offset: int) -> RegionSpec:
    guest_address, size, user_address, mmap_offset = MEMORY_REGION.unpack_from(payload, offset)
    return RegionSpec(guest_address, size, user_address, mmap_offset)


def pack_region(spec: RegionSpec) -> bytes:
    return MEMORY_REGION.pack(spec.guest_address, spec.size, spec.user_address, spec.mmap_offset)

"""TPM 2.0 commands as bytes, and what their answers carry.

A command is tag16 size32 code32, handles, an authorization area when the tag is SESSIONS, parameters;
an answer is tag16 size32 rc32, a handle for some, parameters. Everything is big endian.
Only what a measuring host needs is here; each builder names its section in TPM 2.0 Library Part 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from rayos_tpm import pcr as pcrs_
from rayos_tpm.errors import CommandFailed, MalformedMessage

HEADER: Final = struct.Struct(">HII")
BUFFER_SIZE: Final = 4096  # MAX_COMMAND_SIZE and MAX_RESPONSE_SIZE of libtpms
NO_SESSIONS: Final = 0x8001
SESSIONS: Final = 0x8002
RC_SUCCESS: Final = 0
RC_INITIALIZE: Final = 0x100
RC_FAILURE: Final = 0x101
RC_COMMAND_SIZE: Final = 0x142
RC_CANCELED: Final = 0x909

ALG_RSA: Final = 0x0001
ALG_KEYEDHASH: Final = 0x0008
ALG_AES: Final = 0x0006
ALG_SHA256: Final = 0x000B
ALG_NULL: Final = 0x0010
ALG_ECDSA: Final = 0x0018
ALG_ECC: Final = 0x0023
ALG_CFB: Final = 0x0043
ECC_P256: Final = 0x0003

RH_OWNER: Final = 0x40000001
RH_PASSWORD: Final = 0x40000009
RH_NULL: Final = 0x40000007
RH_LOCKOUT: Final = 0x4000000A
RH_ENDORSEMENT: Final = 0x4000000B
RH_PLATFORM: Final = 0x4000000C


class Code(IntEnum):
    """Command codes (Part 2, 6.5.2)."""

    EvictControl = 0x120
    NV_UndefineSpace = 0x122
    ChangeEPS = 0x124
    ChangePPS = 0x125
    Clear = 0x126
    HierarchyChangeAuth = 0x129
    NV_DefineSpace = 0x12A
    PCR_Allocate = 0x12B
    CreatePrimary = 0x131
    NV_Write = 0x137
    PCR_Event = 0x13C
    PCR_Reset = 0x13D
    Startup = 0x144
    Shutdown = 0x145
    ActivateCredential = 0x147
    NV_Read = 0x14E
    PolicySecret = 0x151
    Quote = 0x158
    Unseal = 0x15E
    FlushContext = 0x165
    NV_ReadPublic = 0x169
    ReadPublic = 0x173
    StartAuthSession = 0x176
    GetCapability = 0x17A
    GetRandom = 0x17B
    PCR_Read = 0x17E
    PolicyPCR = 0x17F
    PCR_Extend = 0x182
    EventSequenceComplete = 0x185


# ---- building blocks ----


def sized(data: bytes) -> bytes:
    """A TPM2B: 16-bit size and data."""
    if len(data) > BUFFER_SIZE:
        raise ValueError(f"a TPM2B of {len(data)} bytes; allowed are {BUFFER_SIZE}")
    return struct.pack(">H", len(data)) + data


def password(value: bytes = b"") -> bytes:
    """An authorization by password (empty by default)."""
    return struct.pack(">IHBH", RH_PASSWORD, 0, 0, len(value)) + value


def session(handle: int) -> bytes:
    """An authorization by a policy session, which ends with the command."""
    return struct.pack(">IHBH", handle, 0, 0, 0)


def command(
    code: Code, *, handles: Sequence[int] = (), auths: Sequence[bytes] = (), parameters: bytes = b""
) -> bytes:
    """A complete command frame."""
    body = b"".join(struct.pack(">I", handle) for handle in handles)
    if auths:
        area = b"".join(auths)
        body += struct.pack(">I", len(area)) + area
    body += parameters
    return HEADER.pack(SESSIONS if auths else NO_SESSIONS, HEADER.size + len(body), code) + body


def error_response(code: int) -> bytes:
    """An answer that carries a response code alone (also success of a command without parameters)."""
    return HEADER.pack(NO_SESSIONS, HEADER.size, code)


@dataclass(slots=True)
class Reader:
    """Walks over a structure; every step checks its bounds.

    MalformedMessage on a field that reaches past the end.
    """

    data: bytes
    offset: int = 0

    def take(self, size: int) -> bytes:
        """The next size bytes."""
        end = self.offset + size
        if end > len(self.data):
            raise MalformedMessage(f"a TPM structure of {len(self.data)} bytes ends inside a field of {size}")
        piece = self.data[self.offset : end]
        self.offset = end
        return piece

    def unsigned(self, size: int) -> int:
        """The next size bytes as a big-endian number."""
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        """The next TPM2B's contents."""
        return self.take(self.unsigned(2))

    def rest(self) -> bytes:
        """Everything after the last field read."""
        return self.take(len(self.data) - self.offset)


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: the response code and what follows it."""

    tag: int
    code: int
    body: bytes

    def reader(self, *, handle: bool = False) -> Reader:
        """A reader at the first parameter (handle=True: past a response handle)."""
        reader = Reader(self.body)
        if handle:
            reader.take(4)
        if self.tag == SESSIONS:
            return Reader(reader.take(reader.unsigned(4)))
        return reader

    @property
    def handle(self) -> int:
        """The response handle of a command that returns one."""
        return Reader(self.body).unsigned(4)


def parse_response(frame: bytes) -> Response:
    """The parts of an answer.

    MalformedMessage: shorter than a header, or its size field disagrees with its length.
    """
    if len(frame) < HEADER.size:
        raise MalformedMessage(f"a TPM answer of {len(frame)} bytes; the header alone has {HEADER.size}")
    tag, size, code = HEADER.unpack_from(frame)
    if size != len(frame):
        raise MalformedMessage(f"a TPM answer of {len(frame)} bytes says that it has {size}")
    return Response(tag, code, frame[HEADER.size :])


def checked(name: str, frame: bytes) -> Response:
    """The parts of a successful answer; CommandFailed with the command's name for any other."""
    response = parse_response(frame)
    if response.code != RC_SUCCESS:
        raise CommandFailed(name, response.code)
    return response


# ---- start, stop, capabilities ----


def startup() -> bytes:
    """TPM2_Startup(CLEAR), 9.3."""
    return command(Code.Startup, parameters=b"\0\0")


def shutdown() -> bytes:
    """TPM2_Shutdown(CLEAR), 9.4."""
    return command(Code.Shutdown, parameters=b"\0\0")


def pcr_allocate_sha256() -> bytes:
    """TPM2_PCR_Allocate, 22.5: SHA-256 on all 24 registers, SHA-1, SHA-384 and SHA-512 on none.

    It takes effect at the next TPM_Init.
    """
    banks = ((0x0004, b"\0\0\0"), (ALG_SHA256, b"\xff\xff\xff"), (0x000C, b"\0\0\0"), (0x000D, b"\0\0\0"))
    selection = struct.pack(">I", len(banks))
    for algorithm, bitmap in banks:
        selection += struct.pack(">HB", algorithm, len(bitmap)) + bitmap
    return command(Code.PCR_Allocate, handles=[RH_PLATFORM], auths=[password()], parameters=selection)


def get_capability(capability: int, first: int, count: int) -> bytes:
    """TPM2_GetCapability, 30.2."""
    return command(Code.GetCapability, parameters=struct.pack(">III", capability, first, count))


CAP_TPM_PROPERTIES: Final = 6


def parse_properties(response: Response) -> dict[int, int]:
    """The property-value pairs of an answer to GetCapability(TPM_PROPERTIES)."""
    reader = response.reader()
    reader.take(1)  # moreData
    if (kind := reader.unsigned(4)) != CAP_TPM_PROPERTIES:
        raise MalformedMessage(f"asked for TPM properties, the answer has capability {kind}")
    return {reader.unsigned(4): reader.unsigned(4) for _ in range(reader.unsigned(4))}


# ---- platform configuration registers ----


def pcr_selection(chosen: Iterable[int]) -> bytes:
    """A TPML_PCR_SELECTION of the SHA-256 bank."""
    return struct.pack(">IHB", 1, ALG_SHA256, pcrs_.SELECT_SIZE) + pcrs_.select_bitmap(chosen)


def pcr_extend(index: int, digest: bytes) -> bytes:
    """TPM2_PCR_Extend of the SHA-256 bank, 22.2."""
    if len(digest) != pcrs_.DIGEST_SIZE:
        raise ValueError(f"a digest of {len(digest)} bytes; SHA-256 has {pcrs_.DIGEST_SIZE}")
    return command(
        Code.PCR_Extend,
        handles=[pcrs_.check_index(index)],
        auths=[password()],
        parameters=struct.pack(">IH", 1, ALG_SHA256) + digest,
    )


def pcr_read(chosen: Iterable[int]) -> bytes:
    """TPM2_PCR_Read of the SHA-256 bank, 22.4. A TPM answers with at most eight values."""
    return command(Code.PCR_Read, parameters=pcr_selection(chosen))


def parse_pcr_read(response: Response) -> dict[int, bytes]:
    """The values that the TPM chose to return, by register; empty when it has no SHA-256 bank."""
    reader = response.reader()
    reader.take(4)  # pcrUpdateCounter
    indices: list[int] = []
    for _ in range(reader.unsigned(4)):
        algorithm, size = reader.unsigned(2), reader.unsigned(1)
        bitmap = reader.take(size)
        if algorithm == ALG_SHA256:
            indices.extend(pcrs_.selected(bitmap))
    values = [reader.sized() for _ in range(reader.unsigned(4))]
    if len(values) != len(indices):
        raise MalformedMessage(f"PCR_Read names {len(indices)} registers and carries {len(values)} values")
    return dict(zip(indices, values, strict=True))

"""The control channel between QEMU and a TPM emulator, both directions.

Requests and replies follow each other strictly; a request is a 32-bit command number and a body
whose length the number (and for blobs a length field) decides; a reply starts with a 32-bit result.
Everything is big endian. Source: swtpm's include/swtpm/tpm_ioctl.h (0.7) and QEMU's
backends/tpm/tpm_ioctl.h (10.0). The state blob of a PC's TPM stays under 64 KiB.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from rayos_tpm.errors import MalformedMessage

WORD: Final = struct.Struct(">I")
RESULT_SIZE: Final = WORD.size
BLOB_LIMIT: Final = 1 << 20  # far above the 15 KB that libtpms stores; bounds what a peer can make us hold
RESULT_OK: Final = 0
RESULT_FAIL: Final = 9  # TPM_FAIL of TPM 1.2, which the control channel speaks
RESULT_BAD_LOCALITY: Final = 61  # TPM_BAD_LOCALITY
RESULT_BAD_ORDINAL: Final = 10  # TPM_BAD_ORDINAL
INIT_DELETE_VOLATILE: Final = 1  # set by QEMU when it resumes a migrated TPM


class Control(IntEnum):
    """Command numbers of the control channel."""

    GET_CAPABILITY = 1
    INIT = 2
    SHUTDOWN = 3
    GET_TPMESTABLISHED = 4
    SET_LOCALITY = 5
    HASH_START = 6
    HASH_DATA = 7
    HASH_END = 8
    CANCEL_TPM_CMD = 9
    STORE_VOLATILE = 10
    RESET_TPMESTABLISHED = 11
    GET_STATEBLOB = 12
    SET_STATEBLOB = 13
    STOP = 14
    GET_CONFIG = 15
    SET_DATAFD = 16
    SET_BUFFERSIZE = 17
    GET_INFO = 18
    LOCK_STORAGE = 19


# Bytes after the command number, without a blob.
_BODY: Final = {
    Control.INIT: 4,
    Control.SET_LOCALITY: 4,
    Control.HASH_DATA: 4,
    Control.RESET_TPMESTABLISHED: 4,
    Control.GET_STATEBLOB: 12,
    Control.SET_STATEBLOB: 12,
    Control.SET_BUFFERSIZE: 4,
    Control.GET_INFO: 16,
    Control.LOCK_STORAGE: 4,
}
# Bytes of a successful reply, result included, without a blob.
_REPLY: Final = {
    Control.GET_CAPABILITY: 8,
    Control.GET_TPMESTABLISHED: 8,
    Control.GET_STATEBLOB: 16,
    Control.GET_CONFIG: 8,
    Control.SET_BUFFERSIZE: 16,
    Control.GET_INFO: 12,
}
_BLOB_REQUEST: Final = frozenset({Control.HASH_DATA, Control.SET_STATEBLOB})
_BLOB_REPLY: Final = frozenset({Control.GET_STATEBLOB, Control.GET_INFO})


@dataclass(frozen=True, slots=True)
class ControlRequest:
    """One request: its command and the bytes after the command number."""

    command: Control
    body: bytes = b""

    def pack(self) -> bytes:
        """The bytes on the wire."""
        return WORD.pack(self.command) + self.body

    @property
    def first_word(self) -> int:
        """The body's first 32 bits (INIT: flags; SET_BUFFERSIZE: size); 0 when there is no body."""
        return int(WORD.unpack_from(self.body)[0]) if len(self.body) >= WORD.size else 0


def _blob_length(buffer: bytes, end: int) -> int:
    """The length field that stands just before the blob."""
    (length,) = WORD.unpack_from(buffer, end - WORD.size)
    if length > BLOB_LIMIT:
        raise MalformedMessage(
            f"a control message announces {length} bytes of data; allowed are {BLOB_LIMIT}"
        )
    return int(length)


def request_length(buffer: bytes) -> int | None:
    """How many bytes the request at the start of buffer has, or None when more bytes must come first.

    MalformedMessage: the command number is not in the table, or a blob is over BLOB_LIMIT.
    """
    if len(buffer) < WORD.size:
        return None
    (number,) = WORD.unpack_from(buffer)
    try:
        command = Control(number)
    except ValueError:
        raise MalformedMessage(
            f"control command {number} is unknown; known are 1 to {max(Control)}"
        ) from None
    end = WORD.size + _BODY.get(command, 0)
    if command not in _BLOB_REQUEST:
        return end
    return None if len(buffer) < end else end + _blob_length(buffer, end)


def parse_request(message: bytes) -> ControlRequest:
    """The request in exactly these bytes (as request_length measured them)."""
    if request_length(message) != len(message):
        raise MalformedMessage(
            f"a control request of {len(message)} bytes has another length than its command says"
        )
    return ControlRequest(Control(WORD.unpack_from(message)[0]), message[WORD.size :])


def reply_length(command: Control, buffer: bytes) -> int | None:
    """How many bytes the reply at the start of buffer has, or None when more must come first.

    A failed command is answered with the result alone, except that swtpm fills in the whole fixed part
    for the commands that carry a blob; whichever has arrived is accepted.
    """
    if len(buffer) < RESULT_SIZE:
        return None
    fixed = _REPLY.get(command, RESULT_SIZE)
    if result(buffer) != RESULT_OK:
        return min(fixed, len(buffer)) if command in _BLOB_REPLY else RESULT_SIZE
    if command not in _BLOB_REPLY:
        return fixed
    return None if len(buffer) < fixed else fixed + _blob_length(buffer, fixed)


def result(reply: bytes) -> int:
    """The result word that every reply starts with."""
    return int(WORD.unpack_from(reply)[0])


def pack_result(code: int) -> bytes:
    """A reply that carries a result alone."""
    return WORD.pack(code)


def init(*, flags: int = 0) -> ControlRequest:
    """Power the TPM on (TPM_Init)."""
    return ControlRequest(Control.INIT, WORD.pack(flags))


def set_locality(locality: int) -> ControlRequest:
    """Choose the locality of the commands that follow, 0 to 4."""
    return ControlRequest(Control.SET_LOCALITY, struct.pack(">B3x", locality))


def hash_data(data: bytes) -> ControlRequest:
    """A part of the data that an H-CRTM or D-RTM sequence measures."""
    return ControlRequest(Control.HASH_DATA, WORD.pack(len(data)) + data)


def set_buffer_size(size_bytes: int) -> ControlRequest:
    """Ask for (0) or set the size of the command buffer."""
    return ControlRequest(Control.SET_BUFFERSIZE, WORD.pack(size_bytes))

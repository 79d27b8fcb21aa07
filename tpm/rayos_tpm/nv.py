"""Non-volatile storage: the guest-readable policy and the endorsement key's certificate.

Both indices are made with the platform's authorization before the guest runs, so the guest's owner can read
them and cannot undefine them. The policy index is written with an authorization value that only the host
knows; it holds POLICY_SIZE bytes. Specification: TPM 2.0 Part 2, 13 and Part 3, 31.
"""

from __future__ import annotations

import struct
from typing import Final

from rayos_tpm import command
from rayos_tpm.command import ALG_SHA256, RH_PLATFORM, Code
from rayos_tpm.errors import TpmError

POLICY_INDEX: Final = 0x01800010
POLICY_SIZE: Final = 256
CERTIFICATE_INDEX: Final = 0x01C0000A  # TCG EK Credential Profile 2.5, 2.2.1.4: ECC P-256
CERTIFICATE_LIMIT: Final = 1024  # MAX_NV_BUFFER_SIZE of libtpms: one command writes it

# TPMA_NV bits (Part 2, 13.4).
PP_WRITE: Final = 1 << 0
AUTH_WRITE: Final = 1 << 2
PP_READ: Final = 1 << 16
OWNER_READ: Final = 1 << 17
AUTH_READ: Final = 1 << 18
NO_DA: Final = 1 << 25
PLATFORM_CREATE: Final = 1 << 30

_GUEST_READABLE: Final = PP_WRITE | PP_READ | OWNER_READ | AUTH_READ | NO_DA | PLATFORM_CREATE
POLICY_ATTRIBUTES: Final = _GUEST_READABLE | AUTH_WRITE
CERTIFICATE_ATTRIBUTES: Final = _GUEST_READABLE


def define(index: int, size_bytes: int, attributes: int, auth: bytes = b"") -> bytes:
    """TPM2_NV_DefineSpace by the platform, 31.3."""
    public = (
        struct.pack(">IHI", index, ALG_SHA256, attributes)
        + command.sized(b"")
        + struct.pack(">H", size_bytes)
    )
    return command.command(
        Code.NV_DefineSpace,
        handles=[RH_PLATFORM],
        auths=[command.password()],
        parameters=command.sized(auth) + command.sized(public),
    )


def undefine(index: int) -> bytes:
    """TPM2_NV_UndefineSpace by the platform, 31.4."""
    return command.command(Code.NV_UndefineSpace, handles=[RH_PLATFORM, index], auths=[command.password()])


def write(index: int, data: bytes, *, authority: int | None = None, auth: bytes = b"") -> bytes:
    """TPM2_NV_Write from offset 0, 31.7. authority: who authorizes, by default the index itself."""
    return command.command(
        Code.NV_Write,
        handles=[index if authority is None else authority, index],
        auths=[command.password(auth)],
        parameters=command.sized(data) + struct.pack(">H", 0),
    )


def read(index: int, size_bytes: int, *, authority: int | None = None, auth: bytes = b"") -> bytes:
    """TPM2_NV_Read from offset 0, 31.13; the answer holds one TPM2B."""
    return command.command(
        Code.NV_Read,
        handles=[index if authority is None else authority, index],
        auths=[command.password(auth)],
        parameters=struct.pack(">HH", size_bytes, 0),
    )


def pad_policy(data: bytes) -> bytes:
    """A policy as it stands in its index: filled with zeroes to POLICY_SIZE.

    TpmError: it is longer.
    """
    if len(data) > POLICY_SIZE:
        raise TpmError(f"a policy of {len(data)} bytes; the NV index holds {POLICY_SIZE}")
    return data.ljust(POLICY_SIZE, b"\0")

"""The keys of a TPM that this project uses: templates, handles and names.

The attestation key is an ECC P-256 primary of the platform hierarchy, made persistent before the guest runs:
the guest's owner can neither clear it nor evict it (firmware randomises the platform's authorization), and
the clock in its quotes is not obfuscated. The endorsement key follows the TCG's template for ECC P-256, so
tpm2-tools derive the same. Both come from the TPM's seeds, so no key blob is stored.
Specification: TPM 2.0 Part 2, 12.2 and Part 3, 24.1 and 28.5; TCG EK Credential Profile 2.5, B.3.4.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from rayos_tpm import command
from rayos_tpm.command import (
    ALG_AES,
    ALG_CFB,
    ALG_ECC,
    ALG_ECDSA,
    ALG_NULL,
    ALG_SHA256,
    ECC_P256,
    Code,
    Reader,
)
from rayos_tpm.errors import MalformedMessage

AK_HANDLE: Final = 0x81810001  # persistent, platform range (Part 2, 7.5)

# TPMA_OBJECT bits (Part 2, 8.3).
FIXED_TPM: Final = 1 << 1
FIXED_PARENT: Final = 1 << 4
SENSITIVE_DATA_ORIGIN: Final = 1 << 5
USER_WITH_AUTH: Final = 1 << 6
ADMIN_WITH_POLICY: Final = 1 << 7
NO_DA: Final = 1 << 10
RESTRICTED: Final = 1 << 16
DECRYPT: Final = 1 << 17
SIGN: Final = 1 << 18

# PolicySecret(TPM_RH_ENDORSEMENT), the policy of TCG's endorsement keys (EK profile, B.6.2).
_EK_POLICY: Final = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
_EMPTY_POINT: Final = command.sized(b"") * 2
_EK_POINT: Final = command.sized(bytes(32)) * 2

AK_TEMPLATE: Final = (
    struct.pack(
        ">HHI",
        ALG_ECC,
        ALG_SHA256,
        FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | NO_DA | RESTRICTED | SIGN,
    )
    + command.sized(b"")
    + struct.pack(">HHHHH", ALG_NULL, ALG_ECDSA, ALG_SHA256, ECC_P256, ALG_NULL)
    + _EMPTY_POINT
)
EK_TEMPLATE: Final = (
    struct.pack(
        ">HHI",
        ALG_ECC,
        ALG_SHA256,
        FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | ADMIN_WITH_POLICY | RESTRICTED | DECRYPT,
    )
    + command.sized(_EK_POLICY)
    + struct.pack(">HHHHHH", ALG_AES, 128, ALG_CFB, ALG_NULL, ECC_P256, ALG_NULL)
    + _EK_POINT
)


def create_primary(hierarchy: int, template: bytes, *, data: bytes = b"") -> bytes:
    """TPM2_CreatePrimary, Part 3, 24.1. data: what a sealed object holds, else empty."""
    sensitive = command.sized(command.sized(b"") + command.sized(data))
    parameters = sensitive + command.sized(template) + command.sized(b"") + struct.pack(">I", 0)
    return command.command(
        Code.CreatePrimary, handles=[hierarchy], auths=[command.password()], parameters=parameters
    )


def parse_created(response: command.Response) -> tuple[int, bytes]:
    """The transient handle and the TPMT_PUBLIC of a created primary."""
    return response.handle, response.reader(handle=True).sized()


def evict_control(hierarchy: int, handle: int, persistent: int) -> bytes:
    """TPM2_EvictControl, 28.5: keep a transient object, or drop a persistent one (both handles equal)."""
    return command.command(
        Code.EvictControl,
        handles=[hierarchy, handle],
        auths=[command.password()],
        parameters=struct.pack(">I", persistent),
    )


def flush_context(handle: int) -> bytes:
    """TPM2_FlushContext, 28.4."""
    return command.command(Code.FlushContext, parameters=struct.pack(">I", handle))


def read_public(handle: int) -> bytes:
    """TPM2_ReadPublic, 12.4; its answer starts with the TPM2B_PUBLIC."""
    return command.command(Code.ReadPublic, handles=[handle])


def change_auth(hierarchy: int, auth: bytes) -> bytes:
    """TPM2_HierarchyChangeAuth of a hierarchy whose authorization is empty, 24.8."""
    return command.command(
        Code.HierarchyChangeAuth,
        handles=[hierarchy],
        auths=[command.password()],
        parameters=command.sized(auth),
    )


def name_of(public: bytes) -> bytes:
    """An object's name: the hash algorithm and SHA-256 of its TPMT_PUBLIC (Part 1, 16)."""
    return struct.pack(">H", ALG_SHA256) + hashlib.sha256(public).digest()


@dataclass(frozen=True, slots=True)
class Point:
    """An ECC P-256 point, big-endian coordinates of 32 bytes."""

    x: bytes
    y: bytes


def point_of(public: bytes) -> Point:
    """The point in a TPMT_PUBLIC of an ECC P-256 key.

    MalformedMessage: another kind of key, or bytes that are not a TPMT_PUBLIC.
    """
    reader = Reader(public)
    kind = reader.unsigned(2)
    reader.take(6)  # nameAlg, attributes
    reader.sized()  # policy
    if kind != ALG_ECC:
        raise MalformedMessage(f"a public key of type {kind:#x}; only ECC ({ALG_ECC:#x}) is used")
    if reader.unsigned(2) != ALG_NULL:
        reader.take(4)  # symmetric key size and mode
    if reader.unsigned(2) != ALG_NULL:
        reader.take(2)  # scheme's hash
    if (curve := reader.unsigned(2)) != ECC_P256:
        raise MalformedMessage(f"an ECC key on curve {curve:#x}; only P-256 ({ECC_P256:#x}) is used")
    if reader.unsigned(2) != ALG_NULL:
        reader.take(2)
    x, y = reader.sized(), reader.sized()
    if max(len(x), len(y)) > 32 or reader.offset != len(public):
        raise MalformedMessage(f"a P-256 public area of {len(public)} bytes does not end after its point")
    return Point(x.rjust(32, b"\0"), y.rjust(32, b"\0"))

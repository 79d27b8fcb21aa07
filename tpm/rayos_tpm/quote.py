"""Quotes: the command, and what its answer attests.

A quote is a TPMS_ATTEST, signed by the attestation key: the caller's nonce, the clock, the firmware version
and SHA-256 over the selected registers. Specification: TPM 2.0 Part 2, 10.12 and Part 3, 18.4.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from rayos_tpm import command, pcr
from rayos_tpm.command import ALG_ECDSA, ALG_NULL, ALG_SHA256, Code, Reader
from rayos_tpm.errors import MalformedMessage

MAGIC: Final = 0xFF544347  # TPM_GENERATED_VALUE
ATTEST_QUOTE: Final = 0x8018  # TPM_ST_ATTEST_QUOTE
NONCE_LIMIT: Final = 64  # sizeof(TPMU_HA) in libtpms: TPM2B_DATA


def quote(handle: int, nonce: bytes, chosen: tuple[int, ...]) -> bytes:
    """TPM2_Quote with the key's own scheme, 18.4.

    ValueError: a nonce that the TPM would not take.
    """
    if len(nonce) > NONCE_LIMIT:
        raise ValueError(f"a nonce of {len(nonce)} bytes; a quote carries up to {NONCE_LIMIT}")
    return command.command(
        Code.Quote,
        handles=[handle],
        auths=[command.password()],
        parameters=command.sized(nonce) + struct.pack(">H", ALG_NULL) + command.pcr_selection(chosen),
    )


def parse_quote(response: command.Response) -> tuple[bytes, bytes]:
    """The TPMS_ATTEST and the TPMT_SIGNATURE, as tpm2_checkquote takes them."""
    reader = response.reader()
    return reader.sized(), reader.rest()


@dataclass(frozen=True, slots=True)
class Attest:
    """The contents of a quote.

    signer: the qualified name of the key. nonce: the caller's. clock_ms, reset_count, restart_count: the TPM's.
    pcrs: the SHA-256 registers it covers. digest: over their values, ascending.
    """

    signer: bytes
    nonce: bytes
    clock_ms: int
    reset_count: int
    restart_count: int
    is_safe: bool
    firmware_version: int
    pcrs: tuple[int, ...]
    digest: bytes


def parse_attest(message: bytes) -> Attest:
    """The contents of a TPMS_ATTEST.

    MalformedMessage: not made inside a TPM, not a quote, or of another bank than SHA-256.
    """
    reader = Reader(message)
    if reader.unsigned(4) != MAGIC:
        raise MalformedMessage("the quote does not start with the mark of a TPM (ff544347)")
    if (kind := reader.unsigned(2)) != ATTEST_QUOTE:
        raise MalformedMessage(f"the attestation is of type {kind:#x}, a quote is {ATTEST_QUOTE:#x}")
    signer, nonce = reader.sized(), reader.sized()
    clock, resets, restarts, safe = (reader.unsigned(size) for size in (8, 4, 4, 1))
    firmware = reader.unsigned(8)
    chosen: tuple[int, ...] = ()
    for _ in range(reader.unsigned(4)):
        algorithm, size = reader.unsigned(2), reader.unsigned(1)
        bitmap = reader.take(size)
        if algorithm != ALG_SHA256:
            raise MalformedMessage(
                f"the quote covers bank {algorithm:#x}; only SHA-256 ({ALG_SHA256:#x}) is used"
            )
        chosen += pcr.selected(bitmap)
    digest = reader.sized()
    if reader.offset != len(message):
        raise MalformedMessage(f"the quote has {len(message) - reader.offset} bytes after its end")
    return Attest(signer, nonce, clock, resets, restarts, bool(safe), firmware, chosen, digest)


def parse_signature(signature: bytes) -> tuple[int, int]:
    """r and s of an ECDSA-SHA256 TPMT_SIGNATURE."""
    reader = Reader(signature)
    scheme, hashed = reader.unsigned(2), reader.unsigned(2)
    if (scheme, hashed) != (ALG_ECDSA, ALG_SHA256):
        raise MalformedMessage(
            f"a signature of scheme {scheme:#x} over {hashed:#x}; expected ECDSA over SHA-256"
        )
    r, s = reader.sized(), reader.sized()
    if reader.offset != len(signature) or max(len(r), len(s)) > 32:
        raise MalformedMessage(f"a signature of {len(signature)} bytes is not one of P-256")
    return int.from_bytes(r, "big"), int.from_bytes(s, "big")

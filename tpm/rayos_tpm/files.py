"""A quote as files that other tools read, and back.

quote.msg is a TPMS_ATTEST, quote.sig a TPMT_SIGNATURE, pcrs.bin the quoted values in ascending order, ak.pem
the attestation key, pcrs.tpm2 the values as tpm2-tools keep them, for
`tpm2_checkquote -u ak.pem -m quote.msg -s quote.sig -f pcrs.tpm2 -q NONCE`. (With -l it takes pcrs.bin, but
version 5.4 then fails on eight registers or more.) log.json is our log, log.bin the same for `tpm2_eventlog`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rayos_tpm import pcr, quote, signature
from rayos_tpm.command import ALG_SHA256
from rayos_tpm.errors import MalformedMessage, TpmError
from rayos_tpm.protocol import Attestation

_SELECTION_SIZE: Final = 8  # sizeof(TPMS_PCR_SELECTION)
READ_LIMIT: Final = 16 << 20  # a log of all entries has 2 MiB


def quote_files(taken: Attestation) -> dict[str, bytes]:
    """A quote and its log as the contents of files, by name."""
    bundle, log = taken.bundle, taken.log
    return {
        "quote.msg": bundle.message,
        "quote.sig": bundle.signature,
        "pcrs.bin": b"".join(bundle.values.values()),
        "pcrs.tpm2": pack_tpm2_pcrs(bundle.values),
        "ak.pem": signature.to_pem(bundle.ak_public),
        "nonce": bundle.nonce.hex().encode() + b"\n",
        "log.json": log.to_json(),
        "log.bin": log.to_tcg(),
    }


def write_quote(directory: Path, taken: Attestation) -> list[Path]:
    """Write quote_files into a directory, which is made when missing; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = quote_files(taken)
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    return [directory / name for name in contents]


def pack_tpm2_pcrs(values: Mapping[int, bytes]) -> bytes:
    """Packs SHA-256 registers as `tpm2_quote -o` and `tpm2_pcrread -o` write them. They are C structures of 16 banks,
    and of eight digests with room for 64 bytes each, little endian (tpm2-tools 5, lib/pcr.c).
    """
    bank = struct.pack("<HB", ALG_SHA256, pcr.SELECT_SIZE) + pcr.select_bitmap(values)
    selection = struct.pack("<I", 1) + bank.ljust(_SELECTION_SIZE, b"\0").ljust(16 * _SELECTION_SIZE, b"\0")
    digests = [
        struct.pack("<H", pcr.DIGEST_SIZE) + values[index].ljust(64, b"\0") for index in sorted(values)
    ]
    lists = [digests[start : start + 8] for start in range(0, len(digests), 8)]
    packed = [struct.pack("<I", len(part)) + b"".join(part).ljust(8 * 66, b"\0") for part in lists]
    return selection + struct.pack("<I", len(packed)) + b"".join(packed)


def read(path: Path) -> bytes:
    """A file's contents; TpmError when it cannot be read or is far larger than any of these files."""
    try:
        with path.open("rb") as file:
            data = file.read(READ_LIMIT + 1)
    except OSError as error:
        raise TpmError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > READ_LIMIT:
        raise MalformedMessage(f"{path} has over {READ_LIMIT >> 20} MiB, no file of this kind has")
    return data


def values_of(message: bytes, pcrs: bytes) -> dict[int, bytes]:
    """The register values in pcrs.bin, by the registers that the quote names.

    MalformedMessage: not a quote, or another number of values.
    """
    chosen = quote.parse_attest(message).pcrs
    if len(pcrs) != len(chosen) * pcr.DIGEST_SIZE:
        raise MalformedMessage(
            f"the register values have {len(pcrs)} bytes; the quote covers {len(chosen)} registers of 32"
        )
    return {index: pcrs[32 * place : 32 * place + 32] for place, index in enumerate(chosen)}

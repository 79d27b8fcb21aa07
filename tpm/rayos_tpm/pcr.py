"""Platform configuration registers: what a sequence of extends leaves behind.

A bank holds 24 SHA-256 registers, of which guests and reports see the first 16. Registers 17 to 22
belong to the dynamic root of trust: all ones after a reset, zero once a D-RTM sequence ran.
Specification: TPM 2.0 Library Part 1, 11.4 and 17; PC Client Platform TPM Profile 1.05, 4.6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

DIGEST_SIZE: Final = 32  # SHA-256
PCR_COUNT: Final = 24  # PC Client Platform TPM Profile 1.05, 4.6.1
EXPOSED: Final = 16  # the static registers, 0 to 15; 16 and 23 are scratch, 17 to 22 dynamic
DYNAMIC: Final = range(17, 23)
SELECT_SIZE: Final = 3  # bytes in a TPMS_PCR_SELECTION: one bit for each of 24 registers
ZERO: Final = bytes(DIGEST_SIZE)
ONES: Final = b"\xff" * DIGEST_SIZE


def check_index(pcr: int) -> int:
    """Return pcr; ValueError when no such register exists."""
    if not 0 <= pcr < PCR_COUNT:
        raise ValueError(f"PCR {pcr} does not exist; there are 0 to {PCR_COUNT - 1}")
    return pcr


def extend(value: bytes, digest: bytes) -> bytes:
    """The register's new value: SHA-256(old || digest). TPM 2.0 Part 1, 11.4.7."""
    if len(value) != DIGEST_SIZE or len(digest) != DIGEST_SIZE:
        raise ValueError(f"extend of {len(value)} bytes with {len(digest)}; both must be {DIGEST_SIZE}")
    return hashlib.sha256(value + digest).digest()


def select_bitmap(pcrs: Iterable[int]) -> bytes:
    """The three-byte bitmap of a PCR selection, lowest register first."""
    bits = 0
    for pcr in pcrs:
        bits |= 1 << check_index(pcr)
    return bits.to_bytes(SELECT_SIZE, "little")


def selected(bitmap: bytes) -> tuple[int, ...]:
    """The registers that a selection bitmap names, in ascending order."""
    bits = int.from_bytes(bitmap, "little")
    return tuple(pcr for pcr in range(len(bitmap) * 8) if bits >> pcr & 1)


def composite(values: Mapping[int, bytes]) -> bytes:
    """The digest a quote signs: SHA-256 over the values in ascending order. Part 3, 18.4."""
    return hashlib.sha256(b"".join(values[pcr] for pcr in sorted(values))).digest()


def parse_list(text: str) -> tuple[int, ...]:
    """Registers from text such as "0,4,8-11", ascending and without repeats.

    ValueError names the part that is not a register or a range.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and first.isascii() and (last.isdecimal() or not dash)):
            raise ValueError(f"{part.strip()!r} is not a PCR or a range such as 8-11")
        low, high = check_index(int(first[:4])), check_index(int((last if dash else first)[:4]))
        if high < low:
            raise ValueError(f"the PCR range {part.strip()!r} runs backwards")
        chosen.update(range(low, high + 1))
    return tuple(sorted(chosen))


def _reset_values() -> dict[int, bytes]:
    return {pcr: ONES if pcr in DYNAMIC else ZERO for pcr in range(PCR_COUNT)}


@dataclass(slots=True)
class Bank:
    """A SHA-256 bank after Startup(CLEAR), to be extended by replay."""

    values: dict[int, bytes] = field(default_factory=_reset_values)

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extend one register with a 32-byte digest."""
        self.values[check_index(pcr)] = extend(self.values[pcr], digest)

    def reset(self, pcr: int) -> None:
        """Resets a register as TPM2_PCR_Reset does (Part 3, 22.8)."""
        self.values[check_index(pcr)] = ZERO

    def start_dynamic(self, digest: bytes) -> None:
        """A D-RTM sequence: registers 17 to 22 become zero, then 17 takes the digest (Part 1, 34.3)."""
        for pcr in DYNAMIC:
            self.values[pcr] = ZERO
        self.extend(DYNAMIC[0], digest)


def replay(extends: Iterable[tuple[int, bytes]]) -> dict[int, bytes]:
    """All 24 registers after these (pcr, digest) extends from zero, as event-log tools replay them."""
    bank = Bank(dict.fromkeys(range(PCR_COUNT), ZERO))
    for pcr, digest in extends:
        bank.extend(pcr, digest)
    return bank.values

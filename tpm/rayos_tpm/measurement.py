"""The components of a VM, as digests taken from the very bytes that QEMU gets.

A file is hashed through a descriptor; rayos_tpm.artefact makes copies that cannot change between the measurement
and their use.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rayos_tpm import pcr
from rayos_tpm.phase import Phase

DESCRIPTION_LIMIT: Final = 1024  # bytes of UTF-8
_PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Measurement:
    """One event of the host's log before it has a register.

    phase: the boot phase, which decides the register by the VM's profile.
    description: what was measured, for people: "kernel vmlinux-6.1".
    digest: SHA-256, 32 bytes.
    """

    phase: Phase
    description: str
    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != pcr.DIGEST_SIZE:
            raise ValueError(f"{self.description}: a digest of {len(self.digest)} bytes; SHA-256 has 32")
        if len(self.description.encode()) > DESCRIPTION_LIMIT:
            raise ValueError(f"a description of {len(self.description)} characters; allowed are 1024 bytes")


def of_bytes(phase: Phase, description: str, data: bytes) -> Measurement:
    """Measure data that is at hand: a command line, a launch record."""
    return Measurement(phase, description, hashlib.sha256(data).digest())


def of_descriptor(phase: Phase, description: str, descriptor: int) -> Measurement:
    """Measure an open regular file or memfd from its start; its offset stays. Blocks: use a thread."""
    total = hashlib.sha256()
    for piece in pieces(descriptor):
        total.update(piece)
    return Measurement(phase, description, total.digest())


def pieces(descriptor: int) -> Iterator[bytes]:
    """A file's contents from its start, a MiB at a time, whatever its offset is."""
    offset = 0
    while piece := os.pread(descriptor, _PIECE, offset):
        offset += len(piece)
        yield piece


def of_command_line(append: str) -> Measurement:
    """The kernel command line, as the bytes that QEMU passes on."""
    return of_bytes(Phase.CONFIGURATION, f"command line: {append}"[:256], append.encode())


def in_order(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements sorted by phase; those of one phase keep their order."""
    return sorted(measurements, key=lambda item: list(Phase).index(item.phase))

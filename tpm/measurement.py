"""What a VM is made of, as digests taken from the very bytes that QEMU gets.

A file is hashed through a descriptor. As long as QEMU is handed that descriptor's memory (seal_file) the
bytes cannot change between the measurement and their use.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tpm import pcr
from tpm.errors import TpmError
from tpm.phase import Phase

DESCRIPTION_LIMIT: Final = 1024  # bytes of UTF-8
_PIECE: Final = 1 << 20
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


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
    for piece in _pieces(descriptor):
        total.update(piece)
    return Measurement(phase, description, total.digest())


def _pieces(descriptor: int) -> Iterator[bytes]:
    offset = 0
    while piece := os.pread(descriptor, _PIECE, offset):
        offset += len(piece)
        yield piece


def seal_file(phase: Phase, path: Path) -> tuple[int, Measurement]:
    """Copy a file into a sealed memfd and measure it on the way: (descriptor, measurement). Blocks.

    Give QEMU /proc/self/fd/N of the descriptor (inheritable there): nobody can change these bytes again,
    whatever happens to the file. The caller closes the descriptor.
    TpmError: the file cannot be read.
    """
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TpmError(f"cannot read {path} to measure it: {error.strerror}") from None
    target = os.memfd_create(f"rayos-{phase}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        total = hashlib.sha256()
        for piece in _pieces(source):
            total.update(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(target, view) :]
        fcntl.fcntl(target, fcntl.F_ADD_SEALS, _SEALS)
        os.lseek(target, 0, os.SEEK_SET)
        return target, Measurement(phase, f"{phase} {path.name}", total.digest())
    except BaseException:
        os.close(target)
        raise
    finally:
        os.close(source)


def of_command_line(append: str) -> Measurement:
    """The kernel command line, as the bytes that QEMU passes on."""
    return of_bytes(Phase.CONFIGURATION, f"command line: {append}"[:256], append.encode())


def in_order(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements sorted by phase; those of one phase keep their order."""
    return sorted(measurements, key=lambda item: list(Phase).index(item.phase))

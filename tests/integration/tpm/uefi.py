"""OVMF and a kernel with its EFI stub, from Debian's archive into the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayos_images.apt import ARCHIVE, Apt, mirror, unpack
from rayos_images.cache import Cache

_INPUTS = {"recipe": 1, "suite": "bookworm", "packages": ["linux-image-amd64", "ovmf"]}


@dataclass(frozen=True, slots=True)
class Uefi:
    """code: the firmware, read only. variables: its variable store, to be copied. kernel: a bzImage."""

    code: Path
    variables: Path
    kernel: Path


def build(cache: Cache) -> Uefi:
    """Download and unpack once (75 MB); later calls are offline."""

    def make(directory: Path) -> None:
        with cache.scratch("uefiapt") as scratch:
            apt = Apt(scratch / "apt", [(mirror("/debian", ARCHIVE), "bookworm")])
            image = next(name for name in apt.depends("linux-image-amd64") if name.startswith("linux-image"))
            unpack(apt.download([image, "ovmf"], scratch / "debs"), scratch / "root")
            for name in ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"):
                (scratch / "root/usr/share/OVMF" / name).rename(directory / name)
            (kernel,) = (scratch / "root/boot").glob("vmlinuz-*")
            kernel.rename(directory / "vmlinuz")

    entry = cache.build("uefi", _INPUTS, make)
    return Uefi(entry / "OVMF_CODE_4M.fd", entry / "OVMF_VARS_4M.fd", entry / "vmlinuz")

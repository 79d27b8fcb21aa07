"""The kind of a kernel or firmware file, told from its first bytes, and so the way to ask QEMU.

| file | magic | QEMU | screen |
| --- | --- | --- | --- |
| Linux bzImage | `HdrS` at 0x202 (Linux x86 boot protocol, 1.) | -kernel | virtio-gpu |
| ELF with a PVH note | `Xen` note 18, XEN_ELFNOTE_PHYS32_ENTRY | -kernel | virtio-gpu |
| multiboot | 0x1BADB002 in the first 8 KiB (Multiboot 0.6.96, 3.1) | -kernel | VGA |
| UEFI firmware volume | `_FVH` at 40 (UEFI PI 1.8, vol. 3, 3.2.1) | pflash | VGA |
| other firmware | | -bios | VGA |
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rayos_vmm.config.spec import FIRMWARE_BIOS, VmSpec
from rayos_vmm.errors import Invalid

_HDRS_OFFSET: Final = 0x202
_MULTIBOOT_MAGIC: Final = struct.pack("<I", 0x1BADB002)
_MULTIBOOT_SEARCH_BYTES: Final = 8192
_PVH_NOTE: Final = struct.pack("<III", 4, 4, 18) + b"Xen\0"
_PVH_NOTE_64: Final = struct.pack("<III", 4, 8, 18) + b"Xen\0"
_FVH_OFFSET: Final = 40
_PVH_SEARCH_BYTES: Final = 64 << 20  # the note of an unstripped vmlinux is tens of MiB in
FIRMWARE_MAXIMUM_BYTES: Final = 16 << 20  # above, the local APIC's page would be covered


class KernelKind(enum.StrEnum):
    """The ways in which QEMU's `-kernel` boots a file."""

    LINUX = "linux"
    PVH = "pvh"
    MULTIBOOT = "multiboot"


class FirmwareKind(enum.StrEnum):
    """The ways in which firmware is mapped."""

    PFLASH = "pflash"
    BIOS = "bios"


@dataclass(frozen=True, slots=True)
class Boot:
    """The files that QEMU is to boot; all exist."""

    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    cdrom: Path | None = None
    firmware: Path | None = None
    firmware_kind: FirmwareKind | None = None
    firmware_variables: Path | None = None  # a template: the machine gets its own copy
    needs_vga: bool = False


def kernel_kind(head: bytes, *, whole: bytes | None = None) -> KernelKind | None:
    """How QEMU boots this kernel, None if it does not.

    Args:
        head: the file's first 8 KiB.
        whole: where to look for the PVH note, for an ELF file.
    """
    if head[_HDRS_OFFSET : _HDRS_OFFSET + 4] == b"HdrS":
        return KernelKind.LINUX
    for offset in range(0, min(len(head), _MULTIBOOT_SEARCH_BYTES) - 3, 4):
        if head[offset : offset + 4] == _MULTIBOOT_MAGIC:
            return KernelKind.MULTIBOOT
    body = head if whole is None else whole
    if head[:4] == b"\x7fELF" and (_PVH_NOTE in body or _PVH_NOTE_64 in body):
        return KernelKind.PVH
    return None


def firmware_kind(head: bytes) -> FirmwareKind:
    """Whether a firmware image is a UEFI volume (mapped as flash) or a plain BIOS."""
    return FirmwareKind.PFLASH if head[_FVH_OFFSET : _FVH_OFFSET + 4] == b"_FVH" else FirmwareKind.BIOS


def _readable(key: str, text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise Invalid(f"{key} = {text!r} is a relative path; the service needs an absolute one")
    try:
        with path.open("rb") as file:
            if path.is_dir():
                raise IsADirectoryError(21, "Is a directory")
            file.read(1)
    except OSError as error:
        raise Invalid(
            f"{key} {path} cannot be read: {error.strerror}", hint="check the path", code="file_missing"
        ) from None
    return path


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit)


def _initrd(text: str, *, is_multiboot: bool) -> Path:
    """A file, or the modules of a multiboot kernel: each a file and its arguments, separated by commas."""
    if not is_multiboot:
        return _readable("initrd", text)
    for module in text.split(","):
        _readable("initrd", module.split(" ", 1)[0])
    return Path(text)


def inspect(spec: VmSpec) -> Boot:
    """The boot files of a specification that names its own; blocking, reads their heads.

    Raises:
        Invalid: a file is missing or QEMU could not boot it; the message names the key and the file.
    """
    needs_vga = spec.cdrom is not None or spec.firmware is not None
    kernel = _readable("kernel", spec.kernel) if spec.kernel else None
    initrd = None
    if kernel is not None:
        head = _read(kernel, _MULTIBOOT_SEARCH_BYTES)
        kind = kernel_kind(head, whole=_read(kernel, _PVH_SEARCH_BYTES) if head[:4] == b"\x7fELF" else None)
        if kind is None:
            raise Invalid(
                f"kernel {kernel} starts with {head[:4].hex(' ') or 'nothing'}: "
                "allowed are a Linux bzImage, an ELF file with a PVH note, and a multiboot 1 kernel",
                hint="for a kernel with its own boot loader give the disk image (disks) or the ISO (cdrom)",
            )
        needs_vga = needs_vga or kind is KernelKind.MULTIBOOT
        initrd = _initrd(spec.initrd, is_multiboot=kind is KernelKind.MULTIBOOT) if spec.initrd else None
    elif spec.initrd or (spec.append and needs_vga):
        key = "initrd" if spec.initrd else "append"
        raise Invalid(f"{key} is given without kernel", hint=f"give kernel too, or leave {key} out")
    is_plain_bios = spec.firmware in (None, FIRMWARE_BIOS)
    firmware = None if is_plain_bios or spec.firmware is None else _readable("firmware", spec.firmware)
    variables = None
    kind_of_firmware = None
    if firmware is not None:
        size = firmware.stat().st_size
        if not 0 < size <= FIRMWARE_MAXIMUM_BYTES:
            raise Invalid(f"firmware {firmware} has {size} bytes; allowed are 1 to {FIRMWARE_MAXIMUM_BYTES}")
        kind_of_firmware = firmware_kind(_read(firmware, 64))
        sibling = firmware.with_name(firmware.name.replace("CODE", "VARS"))
        if kind_of_firmware is FirmwareKind.PFLASH and sibling != firmware and sibling.is_file():
            variables = sibling
    return Boot(
        kernel=kernel,
        initrd=initrd,
        append=spec.append,
        cdrom=_readable("cdrom", spec.cdrom) if spec.cdrom else None,
        firmware=firmware,
        firmware_kind=kind_of_firmware,
        firmware_variables=variables,
        needs_vga=needs_vga,
    )

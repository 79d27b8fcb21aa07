"""The kind of a kernel or firmware file, told from its first bytes, and so the way to ask QEMU.

| file | magic | QEMU | screen |
| --- | --- | --- | --- |
| kernel | its architecture's `kernel_formats` | -kernel | theirs |
| UEFI firmware volume | `_FVH` at 40 (UEFI PI 1.8, vol. 3, 3.2.1) | pflash | VGA |
| other firmware | | -bios | VGA |
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rayos_vmm.config.spec import FIRMWARE_BIOS, VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.qemu.arch import Architecture, KernelFormat, architecture_of

#: The part of a kernel by which most formats are told.
HEAD_BYTES: Final = 8192
_FVH_OFFSET: Final = 40


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


def kernel_format(architecture: Architecture, head: bytes, whole: bytes | None = None) -> KernelFormat | None:
    """How QEMU boots this kernel on an architecture, None if it does not.

    Args:
        head: the file's first HEAD_BYTES.
        whole: its beginning, as much as the architecture's formats search; None: the head.
    """
    body = head if whole is None else whole
    return next((one for one in architecture.kernel_formats if one.is_it(head, body)), None)


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


def _initrd(text: str, *, is_list: bool) -> Path:
    """A file, or the modules of a multiboot kernel: each a file and its arguments, separated by commas."""
    if not is_list:
        return _readable("initrd", text)
    for module in text.split(","):
        _readable("initrd", module.split(" ", 1)[0])
    return Path(text)


def inspect(spec: VmSpec) -> Boot:
    """The boot files of a specification that names its own; blocking, reads their heads.

    Raises:
        Invalid: a file is missing or QEMU could not boot it; the message names the key and the file.
    """
    architecture = architecture_of(spec)
    needs_vga = spec.cdrom is not None or spec.firmware is not None
    kernel = _readable("kernel", spec.kernel) if spec.kernel else None
    initrd = None
    if kernel is not None:
        formats = architecture.kernel_formats
        head = _read(kernel, HEAD_BYTES)
        is_elf = head[:4] == b"\x7fELF"
        if is_elf and (machine := int.from_bytes(head[18:20], "little")) not in architecture.elf_machines:
            known = ", ".join(str(number) for number in architecture.elf_machines)
            raise Invalid(
                f"kernel {kernel} is an ELF file for machine {machine}; {architecture.name} starts those for {known}"
            )
        whole = _read(kernel, max(one.search_bytes for one in formats)) if is_elf else None
        found = kernel_format(architecture, head, whole)
        if found is None:
            raise Invalid(
                f"kernel {kernel} starts with {head[:4].hex(' ') or 'nothing'}: "
                f"allowed are {', '.join(one.description for one in formats)}",
                hint="for a kernel with its own boot loader give the disk image (disks) or the ISO (cdrom)",
            )
        needs_vga = needs_vga or found.needs_vga
        initrd = _initrd(spec.initrd, is_list=found.takes_modules) if spec.initrd else None
    elif spec.initrd or (spec.append and needs_vga):
        key = "initrd" if spec.initrd else "append"
        raise Invalid(f"{key} is given without kernel", hint=f"give kernel too, or leave {key} out")
    is_plain_bios = spec.firmware in (None, FIRMWARE_BIOS)
    firmware = None if is_plain_bios or spec.firmware is None else _readable("firmware", spec.firmware)
    variables = None
    kind_of_firmware = None
    if firmware is not None:
        size = firmware.stat().st_size
        maximum = architecture.firmware.maximum_bytes
        if not 0 < size <= maximum:
            raise Invalid(f"firmware {firmware} has {size} bytes; allowed are 1 to {maximum}")
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

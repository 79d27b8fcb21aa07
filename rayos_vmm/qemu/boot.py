"""The kind of a kernel or firmware file, told from its first bytes, and so the way to ask QEMU.

| file | magic | QEMU | screen |
| --- | --- | --- | --- |
| kernel | its architecture's `kernel_formats` | -kernel | theirs |
| UEFI firmware volume | `_FVH` at 40 (UEFI PI 1.8, vol. 3, 3.2.1) | pflash | VGA |
| other firmware | | -bios | VGA |
"""

from __future__ import annotations

import enum
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rayos_vmm.config.spec import FIRMWARE_BIOS, VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.qemu.arch import Architecture, KernelFormat, architecture_of

#: The part of a kernel by which most formats are told.
HEAD_BYTES: Final = 8192
_FVH_OFFSET: Final = 40


#: ELF, 1-3: where the class and the machine are; machines by e_machine (gABI 4.1) as people call them.
_ELF_CLASS_OFFSET: Final = 4
_ELFCLASS64: Final = 2
_ELF_MACHINE_OFFSET: Final = 18
_EM_386: Final = 3
ELF_MACHINES: Final = {
    2: "SPARC",
    3: "i386",
    4: "m68k",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC 64",
    22: "S/390",
    40: "ARM",
    43: "SPARC 64",
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}
#: A Linux Image's magic (Linux, arm64/booting.rst; riscv/boot-image-header.rst).
_IMAGE_OFFSET: Final = 56
_IMAGES: Final = {b"ARM\x64": "aarch64", b"RSC\x05": "riscv64"}


#: QEMU has one template for both.
_EDK2: Final = {"edk2-x86_64-code.fd": "edk2-i386-vars.fd", "edk2-x86_64-secure-code.fd": "edk2-i386-vars.fd"}


class FirmwareKind(enum.StrEnum):
    """The ways in which firmware is mapped."""

    PFLASH = "pflash"
    BIOS = "bios"


@dataclass(frozen=True, slots=True)
class Module:
    """A file that a multiboot kernel finds in memory (Multiboot 0.6.96, 3.3), and its command line."""

    path: Path
    arguments: str = ""

    def option(self) -> str:
        """As QEMU's `-initrd` takes it."""
        words = f"{self.path} {self.arguments}" if self.arguments else str(self.path)
        return words.replace(",", ",,")


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
    modules: tuple[Module, ...] = ()  # of a multiboot kernel, in the place of the initrd
    is_64_bit: bool = (
        False  # an ELF file that QEMU's multiboot loader takes only as a 32-bit machine's: in a copy
    )


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


def _modules(text: str) -> tuple[Module, ...]:
    """The modules of a multiboot kernel: each a file and its arguments, separated by commas."""
    if Path(text).exists():
        return (Module(_readable("initrd", text)),)
    parts = [part.partition(" ") for part in text.split(",")]
    return tuple(Module(_readable("initrd", path), arguments) for path, _, arguments in parts)


def load_as_32_bit(kernel: Path, copy: Path) -> None:
    """Writes a copy of a 64-bit ELF file that says that it is for a 386 (ELF, 1-3: e_machine at byte 18).

    Multiboot starts a kernel in 32-bit mode whatever it is made for; QEMU refuses one that says x86-64.
    """
    shutil.copyfile(kernel, copy)
    with copy.open("r+b") as file:
        file.seek(_ELF_MACHINE_OFFSET)
        file.write(_EM_386.to_bytes(2, "little"))


def _variables(code: Path) -> Path | None:
    """The template of a firmware's variables beside its code, by Debian's names or by those of edk2 in QEMU."""
    names = (
        code.name.replace("CODE", "VARS"),
        code.name.replace("code", "vars"),
        _EDK2.get(code.name, code.name),
    )
    found = (code.with_name(name) for name in names if name != code.name)
    return next((path for path in found if path.is_file()), None)


def inspect(spec: VmSpec) -> Boot:
    """The boot files of a specification that names its own; blocking, reads their heads.

    Raises:
        Invalid: a file is missing or QEMU could not boot it; the message names the key and the file.
    """
    architecture = architecture_of(spec)
    needs_vga = spec.cdrom is not None or spec.firmware is not None
    kernel = _readable("kernel", spec.kernel) if spec.kernel else None
    initrd = None
    modules: tuple[Module, ...] = ()
    is_64_bit = False
    if kernel is not None:
        formats = architecture.kernel_formats
        head = _read(kernel, HEAD_BYTES)
        is_elf = head[:4] == b"\x7fELF"
        if is_elf and (machine := int.from_bytes(head[18:20], "little")) not in architecture.elf_machines:
            known = ", ".join(ELF_MACHINES.get(number, str(number)) for number in architecture.elf_machines)
            name = ELF_MACHINES.get(machine, "an unknown processor")
            raise Invalid(
                f"kernel {kernel} is an ELF file for {name} (machine {machine}); "
                f"machine = {spec.machine!r} starts those for {known}"
            )
        if (image := _IMAGES.get(head[_IMAGE_OFFSET : _IMAGE_OFFSET + 4])) not in (None, architecture.name):
            raise Invalid(
                f"kernel {kernel} is a Linux Image for {image}; machine = {spec.machine!r} is {architecture.name}"
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
        is_64_bit = found.takes_modules and is_elf and head[_ELF_CLASS_OFFSET] == _ELFCLASS64
        if spec.initrd and found.takes_modules:
            modules = _modules(spec.initrd)
        elif spec.initrd:
            initrd = _readable("initrd", spec.initrd)
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
        if kind_of_firmware is FirmwareKind.PFLASH:
            variables = _variables(firmware)
    return Boot(
        kernel=kernel,
        initrd=initrd,
        append=spec.append,
        cdrom=_readable("cdrom", spec.cdrom) if spec.cdrom else None,
        firmware=firmware,
        firmware_kind=kind_of_firmware,
        firmware_variables=variables,
        needs_vga=needs_vga,
        modules=modules,
        is_64_bit=is_64_bit,
    )

"""The kind of a file is told from its first bytes; a kind that nobody can boot is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.qemu.arch.x86_64 import X86_64
from rayos_vmm.qemu.boot import (
    HEAD_BYTES,
    FirmwareKind,
    Module,
    firmware_kind,
    inspect,
    kernel_format,
    load_as_32_bit,
)

LINUX = b"MZ" + bytes(0x200) + b"HdrS" + bytes(64)
MULTIBOOT = b"\x7fELF" + bytes(14) + b"\x03\0" + bytes(4076) + struct.pack("<I", 0x1BADB002)
PVH = b"\x7fELF" + bytes(14) + b"\x3e\0" + bytes(20000) + struct.pack("<III", 4, 4, 18) + b"Xen\0" + bytes(8)


def test_kernels_are_told_apart() -> None:
    """By the magic that QEMU's own loader looks for."""
    files = {"linux": LINUX, "multiboot": MULTIBOOT, "pvh": PVH}
    for name, whole in files.items():
        found = kernel_format(X86_64, whole[:HEAD_BYTES], whole)
        assert found is not None and found.name == name
    assert kernel_format(X86_64, PVH[:HEAD_BYTES]) is None
    assert kernel_format(X86_64, b"") is None


def test_firmware_is_told_apart() -> None:
    """A UEFI volume has its signature at 40."""
    assert firmware_kind(bytes(40) + b"_FVH" + bytes(20)) is FirmwareKind.PFLASH
    assert firmware_kind(bytes(64)) is FirmwareKind.BIOS


def test_a_specification_becomes_files_that_exist(tmp_path: Path) -> None:
    """Kernel and initrd; a multiboot kernel gets a VGA screen."""
    kernel, initrd = tmp_path / "k", tmp_path / "i"
    kernel.write_bytes(LINUX)
    initrd.write_bytes(b"x")
    boot = inspect(VmSpec(name="a", kernel=str(kernel), initrd=str(initrd), append="quiet"))
    assert (boot.kernel, boot.initrd, boot.append, boot.needs_vga) == (kernel, initrd, "quiet", False)
    kernel.write_bytes(MULTIBOOT)
    assert inspect(VmSpec(name="a", kernel=str(kernel))).needs_vga
    modules = f"{initrd} one,{initrd} two"
    boot = inspect(VmSpec(name="a", kernel=str(kernel), initrd=modules))
    assert boot.modules == (Module(initrd, "one"), Module(initrd, "two")) and boot.initrd is None
    assert Module(Path("/a,b"), "c,d").option() == "/a,,b c,,d"
    with pytest.raises(Invalid, match=r"initrd .*/none cannot be read"):
        inspect(VmSpec(name="a", kernel=str(kernel), initrd=f"{initrd} one,{tmp_path}/none"))
    bios = inspect(VmSpec(name="a", firmware="bios"))
    assert bios.firmware is None and bios.needs_vga


def test_a_64_bit_multiboot_kernel_is_loaded_from_a_copy_that_says_386(tmp_path: Path) -> None:
    """Nothing else of it is touched, and the file itself not at all."""
    kernel, copy = tmp_path / "k", tmp_path / "copy"
    whole = b"\x7fELF\2" + bytes(13) + b"\x3e\0" + MULTIBOOT[20:]
    kernel.write_bytes(whole)
    assert inspect(VmSpec(name="a", kernel=str(kernel))).is_64_bit
    load_as_32_bit(kernel, copy)
    assert copy.read_bytes() == whole[:18] + b"\3\0" + whole[20:] and kernel.read_bytes() == whole


def test_uefi_code_brings_its_variables(tmp_path: Path) -> None:
    """The VARS file beside the CODE file is the template."""
    code, variables = tmp_path / "OVMF_CODE.fd", tmp_path / "OVMF_VARS.fd"
    code.write_bytes(bytes(40) + b"_FVH" + bytes(100))
    assert inspect(VmSpec(name="a", firmware=str(code))).firmware_variables is None
    variables.write_bytes(b"v")
    assert inspect(VmSpec(name="a", firmware=str(code))).firmware_variables == variables
    edk2, template = tmp_path / "edk2-x86_64-code.fd", tmp_path / "edk2-i386-vars.fd"
    edk2.write_bytes(code.read_bytes())
    template.write_bytes(b"v")
    assert inspect(VmSpec(name="a", firmware=str(edk2))).firmware_variables == template


def test_what_cannot_boot_is_refused_with_key_and_file(tmp_path: Path) -> None:
    """Missing, a directory, of no known kind, without its kernel, relative."""
    text = tmp_path / "text"
    text.write_text("hello")
    missing = tmp_path / "missing"
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"\x7fELF" + bytes(14) + b"\xb7\0" + bytes(100))
    image = tmp_path / "Image"
    image.write_bytes(bytes(56) + b"RSC\x05" + bytes(100))
    cases = {
        f"kernel {foreign} is an ELF file for AArch64 (machine 183); machine = 'q35' starts those for "
        "x86-64, i386": VmSpec(name="a", kernel=str(foreign)),
        f"kernel {image} is a Linux Image for riscv64; machine = 'q35' is x86_64": VmSpec(
            name="a", kernel=str(image)
        ),
        f"kernel {missing} cannot be read: No such file": VmSpec(name="a", kernel=str(missing)),
        f"kernel {tmp_path} cannot be read: Is a directory": VmSpec(name="a", kernel=str(tmp_path)),
        f"kernel {text} starts with 68 65 6c 6c": VmSpec(name="a", kernel=str(text)),
        "initrd is given without kernel": VmSpec(name="a", initrd=str(text)),
        "kernel = 'k' is a relative path": VmSpec(name="a", kernel="k"),
        f"cdrom {missing} cannot be read": VmSpec(name="a", cdrom=str(missing)),
        f"firmware {missing} cannot be read": VmSpec(name="a", firmware=str(missing)),
    }
    for message, spec in cases.items():
        with pytest.raises(Invalid) as refused:
            inspect(spec)
        assert refused.value.message.startswith(message)

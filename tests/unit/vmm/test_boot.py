"""The kind of a file is told from its first bytes; a kind that nobody can boot is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.qemu.arch.x86_64 import X86_64
from rayos_vmm.qemu.boot import HEAD_BYTES, FirmwareKind, firmware_kind, inspect, kernel_format

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
    assert str(inspect(VmSpec(name="a", kernel=str(kernel), initrd=modules)).initrd) == modules
    with pytest.raises(Invalid, match=r"initrd .*/none cannot be read"):
        inspect(VmSpec(name="a", kernel=str(kernel), initrd=f"{initrd} one,{tmp_path}/none"))
    bios = inspect(VmSpec(name="a", firmware="bios"))
    assert bios.firmware is None and bios.needs_vga


def test_uefi_code_brings_its_variables(tmp_path: Path) -> None:
    """The VARS file beside the CODE file is the template."""
    code, variables = tmp_path / "OVMF_CODE.fd", tmp_path / "OVMF_VARS.fd"
    code.write_bytes(bytes(40) + b"_FVH" + bytes(100))
    assert inspect(VmSpec(name="a", firmware=str(code))).firmware_variables is None
    variables.write_bytes(b"v")
    assert inspect(VmSpec(name="a", firmware=str(code))).firmware_variables == variables


def test_what_cannot_boot_is_refused_with_key_and_file(tmp_path: Path) -> None:
    """Missing, a directory, of no known kind, without its kernel, relative."""
    text = tmp_path / "text"
    text.write_text("hello")
    missing = tmp_path / "missing"
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"\x7fELF" + bytes(14) + b"\xb7\0" + bytes(100))
    cases = {
        f"kernel {foreign} is an ELF file for machine 183; x86_64 starts those for 62, 3": VmSpec(
            name="a", kernel=str(foreign)
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

"""x86-64: the PC, by SeaBIOS, qboot or UEFI.

| kernel | magic | screen |
| --- | --- | --- |
| Linux bzImage | `HdrS` at 0x202 (Linux x86 boot protocol, 1.) | virtio-gpu |
| multiboot | 0x1BADB002 in the first 8 KiB (Multiboot 0.6.96, 3.1) | VGA |
| ELF with a PVH note | `Xen` note 18, XEN_ELFNOTE_PHYS32_ENTRY | virtio-gpu |
"""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from typing import Final

from rayos_images.arch import X86_64 as IMAGES
from rayos_vmm.qemu.arch.record import Architecture, Board, Firmware, KernelFormat

_EM_386: Final = 3
_HDRS_OFFSET: Final = 0x202
_MULTIBOOT_MAGIC: Final = struct.pack("<I", 0x1BADB002)
_MULTIBOOT_SEARCH_BYTES: Final = 8192
_PVH_NOTE: Final = struct.pack("<III", 4, 4, 18) + b"Xen\0"
_PVH_NOTE_64: Final = struct.pack("<III", 4, 8, 18) + b"Xen\0"


def _is_linux(head: bytes, _whole: bytes) -> bool:
    return head[_HDRS_OFFSET : _HDRS_OFFSET + 4] == b"HdrS"


def _is_multiboot(head: bytes, _whole: bytes) -> bool:
    end = min(len(head), _MULTIBOOT_SEARCH_BYTES) - 3
    return any(head[offset : offset + 4] == _MULTIBOOT_MAGIC for offset in range(0, end, 4))


def _is_pvh(head: bytes, whole: bytes) -> bool:
    return head[:4] == b"\x7fELF" and (_PVH_NOTE in whole or _PVH_NOTE_64 in whole)


_BOTH_TPMS: Final = {"crb": "tpm-crb", "tis": "tpm-tis"}
_PC: Final = Board(
    options="usb=off,vmport=off,smbus=off",
    cdrom_option=("sata=on", "sata=off"),
    cpus_maximum=255,  # beyond, a processor needs x2APIC, which firmware does not start
    tpms=_BOTH_TPMS,
    buses=("virtio", "ahci", "ide", "nvme", "usb", "scsi", "floppy", "sd"),
    has_ps2=True,
)
#: A PC's CD drive is the first of its second channel, or the third port of AHCI.
_SECOND_CHANNEL: Final = "ide-cd,drive=cd0,bus=ide.1,unit=0,bootindex=0"

X86_64: Final = Architecture(
    name="x86_64",
    images=IMAGES,
    elf_machines=(IMAGES.elf_machine, _EM_386),
    boards={
        "q35": _PC,
        "pc": replace(_PC, cdrom=_SECOND_CHANNEL),
        "microvm": Board(
            options="usb=off,pcie=on,rtc=on,pit=on,pic=on,isa-serial=on",
            cpus_maximum=255,
            serial_lines=1,
            serial_device="isa-serial,chardev={name},index={index}",
            tpms=_BOTH_TPMS,
        ),
        "isapc": Board(
            options="usb=off",
            cpus_maximum=1,
            cpu="486",
            pvpanic="isa",
            tpms=_BOTH_TPMS,
            cdrom=_SECOND_CHANNEL,
            buses=("ide", "floppy"),
            has_ps2=True,
        ),
    },
    firmware=Firmware(
        built_in="bios-256k.bin",
        direct="qboot.rom",
        maximum_bytes=16 << 20,  # above, the local APIC's page would be covered
        flash_option="max-fw-size={maximum_bytes}",
    ),
    kernel_formats=(
        KernelFormat("linux", "a Linux bzImage", _is_linux),
        KernelFormat("multiboot", "a multiboot 1 kernel", _is_multiboot, takes_modules=True, needs_vga=True),
        # The note of an unstripped vmlinux is tens of MiB in.
        KernelFormat("pvh", "an ELF file with a PVH note", _is_pvh, search_bytes=64 << 20),
    ),
    our_cpu="qemu64",
    foreign_cpu="max",
    vga="vhost-user-vga",
    cdrom="ide-cd,drive=cd0,bus=ide.2,bootindex=0",
    debugcon="isa-debugcon,iobase={port},chardev={name}",
    debug_exit="isa-debug-exit,iobase={port},iosize=4",  # a kernel writes a byte, a word or a double word
    pvpanics={"pci": "pvpanic-pci", "isa": "pvpanic"},
    has_power_button=True,  # ACPI
    reset_log="cpu_reset",
    fault_line="Triple fault",
    # One EIP or RIP a processor, and whether it halts.
    registers=re.compile(r"[ER]IP=([0-9a-f]+).*?HLT=(\d)", re.DOTALL),
)

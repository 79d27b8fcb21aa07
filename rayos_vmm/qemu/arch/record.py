"""The record of a processor architecture, as far as a machine's command line and its end depend on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from rayos_images.arch import Architecture as Images


@dataclass(frozen=True, slots=True)
class KernelFormat:
    """A form of kernel that QEMU's `-kernel` starts. `name` is a word, `description` is for people.

    Attributes:
        is_it: judges by the first HEAD_BYTES and by the beginning of the file (up to `search_bytes`).
        search_bytes: how much of an ELF file `is_it` has to see; 0 if the head is enough.
        takes_modules: `initrd` is a list of modules with their arguments.
        needs_vga: it knows no display but VGA.
    """

    name: str
    description: str
    is_it: Callable[[bytes, bytes], bool]
    search_bytes: int = 0
    takes_modules: bool = False
    needs_vga: bool = False


_PCI_BUSES: Final = ("virtio", "ahci", "nvme", "usb", "scsi", "sd")


@dataclass(frozen=True, slots=True)
class Board:
    """A machine type of QEMU's. Devices and options are QEMU's words, with fields in braces for `str.format`.

    Attributes:
        options: of `-machine`, for the parts that are there without being asked for.
        cdrom_option: of `-machine`, when there is a CD or a disk on AHCI, and when not.
        cdrom: the device for a CD where it is not the architecture's.
        buses: that disks may hang on.
        has_ps2: whether there is a PS/2 keyboard and mouse without being asked for.
        cpus_maximum: that QEMU gives it and firmware starts.
        memory_maximum_bytes: that a processor of QEMU's can address beside the devices.
        cpu: the model where it takes no other than old ones; None where any will do.
        serial_lines: how many serial lines are its own (`-serial`); `serial_device` is for those above.
        pvpanic: where a guest finds the panic device unless it is told otherwise: "pci", "isa" or "none".
        tpms: the device for each `tpm.model`.
    """

    options: str
    cpus_maximum: int
    tpms: Mapping[str, str]
    memory_maximum_bytes: int = 1000 << 30  # of 40 bits, less the hole below 1 TiB
    cpu: str | None = None
    cdrom_option: tuple[str, str] = ("", "")
    cdrom: str | None = None
    buses: tuple[str, ...] = _PCI_BUSES
    has_ps2: bool = False
    serial_lines: int = 4
    serial_device: str = ""
    pvpanic: str = "pci"


@dataclass(frozen=True, slots=True)
class Firmware:
    """The firmware that QEMU brings, and how a file of one's own is mapped.

    Attributes:
        built_in: the file that QEMU starts a board with.
        direct: one that starts a kernel and its initrd directly and leaves the TPM's tables alone; None: `built_in`.
        maximum_bytes: of a file.
        flash_option: of `-machine`, when firmware is mapped as flash.
    """

    built_in: str
    direct: str | None
    maximum_bytes: int
    flash_option: str = ""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture. `name` is its word in a specification, `images` is what its guest and QEMU are made of.

    Attributes:
        elf_machines: `e_machine` of the ELF files that its boards start (gABI 4.1).
        boards: machine types by name; the first is the default.
        kernel_formats: in the order in which a file is tried.
        our_cpu: the processor on which our own guest boots the fastest under TCG.
        foreign_cpu: the processor for other guests under TCG.
        vga: the display with VGA, for what knows no other; None: there is none.
        cdrom: the device for a CD, of the block node `cd0`.
        debugcon, debug_exit: ports by which a kernel without drivers talks and ends; None: there are none.
        has_power_button: whether QMP's `system_powerdown` reaches the guest.
        reset_log: the items of `-d` by which a processor's fault is told from a reboot; `fault_line` is in their words.
        registers: finds each processor's instruction pointer and "1" if it halts in what `info registers -a` says.
    """

    name: str
    images: Images
    elf_machines: tuple[int, ...]
    boards: Mapping[str, Board]
    firmware: Firmware
    kernel_formats: tuple[KernelFormat, ...]
    our_cpu: str
    foreign_cpu: str
    vga: str | None
    cdrom: str
    debugcon: str | None
    debug_exit: str | None
    pvpanics: Mapping[str, str]
    has_power_button: bool
    reset_log: str
    fault_line: str
    registers: re.Pattern[str]

"""One record for each processor architecture: its boards, processors, firmware, ports and ends.

Nothing else asks which architecture it is: whoever has to do with one reads the record.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from rayos_vmm.config.spec import BUS_MAXIMUM, VmSpec
from rayos_vmm.config.units import format_size
from rayos_vmm.errors import Invalid
from rayos_vmm.qemu.arch.record import Architecture, Board, Firmware, KernelFormat
from rayos_vmm.qemu.arch.x86_64 import X86_64

ARCHITECTURES: Final = (X86_64,)


def architecture_of(spec: VmSpec) -> Architecture:
    """The architecture of a machine: the one that has its board."""
    return next(one for one in ARCHITECTURES if spec.machine in one.boards)


def board_of(spec: VmSpec) -> Board:
    """The board of a machine."""
    return architecture_of(spec).boards[spec.machine]


def check_board(spec: VmSpec) -> None:
    """Whether the board has what the specification asks of it.

    Raises:
        Invalid: it has not; the message names the key, what was seen and what is allowed.
    """
    maximum = board_of(spec).cpus_maximum
    if spec.cpus > maximum:
        raise Invalid(f"cpus = {spec.cpus} exceeds the {maximum} of machine = {spec.machine!r}")
    most = board_of(spec).memory_maximum_bytes
    if spec.memory_bytes > most:
        raise Invalid(
            f"memory = {spec.memory!r} exceeds the {format_size(most)} of machine = {spec.machine!r}"
        )
    buses = board_of(spec).buses
    for bus, count in Counter(disk.bus for disk in spec.disks).items():
        if count > BUS_MAXIMUM.get(bus, count):
            raise Invalid(f"{count} disks have bus = {bus!r}; at most {BUS_MAXIMUM[bus]} are allowed")
        if bus not in buses:
            raise Invalid(
                f"a disk has bus = {bus!r}, which machine = {spec.machine!r} has not; allowed are {', '.join(buses)}"
            )
    if spec.machine == "isapc" and (spec.gpu.enabled or spec.net.enabled):
        raise Invalid(
            "machine = 'isapc' has no PCI for a display or a card",
            hint="gpu = { enabled = false }, net = { enabled = false }; or --no-gpu --no-net",
        )
    if spec.machine == "microvm" and spec.cdrom is not None:
        raise Invalid("machine = 'microvm' has no CD drive", hint="use q35 or pc")


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Board",
    "Firmware",
    "KernelFormat",
    "architecture_of",
    "board_of",
    "check_board",
]

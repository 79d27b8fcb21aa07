"""One record for each processor architecture: its boards, processors, firmware, ports and ends.

Nothing else asks which architecture it is: whoever has to do with one reads the record.
"""

from __future__ import annotations

from typing import Final

from rayos_vmm.config.spec import VmSpec
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

"""Capabilities, and the device operations that each of them allows.

Invariant: a mask is the union of what its capabilities allow, plus what needs none: giving memory back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntFlag
from typing import Final

from rayos_devices.gate import Op
from rayos_vmm.errors import Forbidden


class Capability(IntFlag):
    """A right of a machine. CAP_AUDIT and CAP_ADMIN allow no device operation: they are rights of callers."""

    CAP_NET = 1 << 0
    CAP_DISK_R = 1 << 1
    CAP_DISK_W = 1 << 2
    CAP_GPU = 1 << 3
    CAP_INPUT = 1 << 4
    CAP_CONSOLE_R = 1 << 5
    CAP_CONSOLE_W = 1 << 6
    CAP_AUDIT = 1 << 7
    CAP_ADMIN = 1 << 8
    CAP_RNG = 1 << 9


NONE: Final = Capability(0)

#: Read and write are the guest's: CAP_CONSOLE_R lets it read what is typed. A flush makes durable what was written
#: while that was allowed, so either right to the disk is enough.
OPERATIONS: Final[dict[Capability, tuple[Op, ...]]] = {
    Capability.CAP_NET: (Op.NET_TX, Op.NET_RX, Op.NET_CONFIG),
    Capability.CAP_DISK_R: (Op.DISK_READ, Op.DISK_FLUSH),
    Capability.CAP_DISK_W: (Op.DISK_WRITE, Op.DISK_FORMAT, Op.DISK_FLUSH),
    Capability.CAP_GPU: (Op.GPU_ALLOC, Op.GPU_RENDER, Op.GPU_READBACK),
    Capability.CAP_INPUT: (Op.INPUT_INJECT, Op.INPUT_POLL),
    Capability.CAP_CONSOLE_R: (Op.CONSOLE_READ, Op.CONSOLE_RESIZE),
    Capability.CAP_CONSOLE_W: (Op.CONSOLE_WRITE,),
    Capability.CAP_RNG: (Op.RNG_READ,),
}

#: A driver that may not free a resource would reuse its number and fail for ever, also once the right is back.
ALWAYS: Final = (Op.GPU_FREE,)


def _union(capabilities: Iterable[Capability]) -> Capability:
    found = NONE
    for capability in capabilities:
        found |= capability
    return found


#: What a machine can hold: the rights to devices.
DEVICE_RIGHTS: Final = _union(OPERATIONS)
DEVICE_NAMES: Final = tuple(str(capability.name) for capability in OPERATIONS)


def mask(capabilities: Capability) -> int:
    """The word of a gate page: bit `Op.index` for each operation that these capabilities allow."""
    word = 0
    for operation in ALWAYS:
        word |= 1 << operation.index
    for capability, operations in OPERATIONS.items():
        if capability in capabilities:
            for operation in operations:
                word |= 1 << operation.index
    return word


def needed(op: Op) -> list[Capability]:
    """The capabilities that allow an operation, each by itself."""
    return [capability for capability, operations in OPERATIONS.items() if op in operations]


def missing(vm: str, capabilities: Iterable[Capability], what: str) -> Forbidden:
    """The error for a right that a machine does not have: it names the right, and the command that gives it."""
    found = " or ".join(str(capability.name) for capability in capabilities)
    return Forbidden(
        f"{vm} does not have {found}, which {what} needs",
        hint=f"rayos grant {vm} {found.split(' ')[0]}",
        code="capability_missing",
    )


def names(capabilities: Capability) -> list[str]:
    """`["CAP_NET", …]`, in the order of the bits."""
    return [str(member.name) for member in Capability if member in capabilities]


def parse(words: Sequence[str]) -> Capability:
    """The device rights of that name; case and the `CAP_` do not matter, `all` means every one.

    Raises:
        ValueError: there is no such capability, or a machine cannot hold it.
    """
    found = NONE
    for word in words:
        name = word.upper() if word.upper().startswith("CAP_") else f"CAP_{word.upper()}"
        if name == "CAP_ALL":
            found |= DEVICE_RIGHTS
            continue
        if name not in Capability.__members__:
            raise ValueError(f"there is no capability {word!r}; known: {', '.join(DEVICE_NAMES)}, all")
        capability = Capability[name]
        if capability not in DEVICE_RIGHTS:
            raise ValueError(f"{name} is a right of callers; a machine can hold {', '.join(DEVICE_NAMES)}")
        found |= capability
    return found

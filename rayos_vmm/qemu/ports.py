"""The ports of a PC by which a kernel without drivers talks, as QEMU's arguments: serial lines, debugcon, debug exit,
pvpanic.

Invariant: every port that says something has a listening socket of the service's, so nothing it says is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rayos_vmm.config.spec import VmSpec

#: A kernel writes its exit value as a byte, a word or a double word.
_DEBUG_EXIT_BYTES: Final = 4


def pvpanic(spec: VmSpec) -> str:
    """Where the guest finds the device that it tells of its panic: "pci", "isa" or "none"."""
    return spec.ports.pvpanic or ("isa" if spec.machine == "isapc" else "pci")


def port_arguments(spec: VmSpec, line_fds: Sequence[int], *, has_pvpanic: bool) -> list[str]:
    """The arguments of all ports; `line_fds` are listening sockets, one for each of `spec.ports.lines`."""
    ports = spec.ports
    arguments: list[str] = []
    for name, fd in zip(ports.lines, line_fds, strict=True):
        arguments += ["-chardev", f"socket,id={name},fd={fd},server=on,wait=off"]
    for index, name in enumerate(ports.lines[: ports.serial]):
        if spec.machine == "microvm" and index:
            arguments += ["-device", f"isa-serial,chardev={name},index={index}"]
        else:
            arguments += ["-serial", f"chardev:{name}"]
    for name, port in zip(ports.lines[ports.serial :], ports.debugcon, strict=True):
        arguments += ["-device", f"isa-debugcon,iobase={port},chardev={name}"]
    if ports.debug_exit is not None:
        arguments += ["-device", f"isa-debug-exit,iobase={ports.debug_exit},iosize={_DEBUG_EXIT_BYTES}"]
    device = {"pci": "pvpanic-pci", "isa": "pvpanic", "none": ""}[pvpanic(spec)]
    if device and has_pvpanic:
        arguments += ["-device", device]
    return arguments

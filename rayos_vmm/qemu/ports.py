"""The ports of a PC by which a kernel without drivers talks, as QEMU's arguments: serial lines, debugcon, debug exit,
pvpanic.

Invariant: every port that says something has a listening socket of the service's, so nothing it says is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.qemu.arch import architecture_of, board_of


def pvpanic(spec: VmSpec) -> str:
    """Where the guest finds the device that it tells of its panic: "pci", "isa" or "none"."""
    return spec.ports.pvpanic or board_of(spec).pvpanic


def port_arguments(spec: VmSpec, line_fds: Sequence[int], *, has_pvpanic: bool) -> list[str]:
    """The arguments of all ports; `line_fds` are listening sockets, one for each of `spec.ports.lines`.

    Raises:
        Invalid: machines of this architecture have no such port.
    """
    ports, board, architecture = spec.ports, board_of(spec), architecture_of(spec)
    arguments: list[str] = []
    for name, fd in zip(ports.lines, line_fds, strict=True):
        arguments += ["-chardev", f"socket,id={name},fd={fd},server=on,wait=off"]
    for index, name in enumerate(ports.lines[: ports.serial]):
        if index >= board.serial_lines:
            arguments += ["-device", board.serial_device.format(name=name, index=index)]
        else:
            arguments += ["-serial", f"chardev:{name}"]
    for name, port in zip(ports.lines[ports.serial :], ports.debugcon, strict=True):
        if architecture.debugcon is None:
            raise Invalid(f"ports.debugcon: machines of {architecture.name} have no such port")
        arguments += ["-device", architecture.debugcon.format(name=name, port=port)]
    if ports.debug_exit is not None:
        if architecture.debug_exit is None:
            raise Invalid(f"ports.debug_exit: machines of {architecture.name} have no such port")
        arguments += ["-device", architecture.debug_exit.format(port=ports.debug_exit)]
    device = architecture.pvpanics.get(pvpanic(spec))
    if device and has_pvpanic:
        arguments += ["-device", device]
    return arguments

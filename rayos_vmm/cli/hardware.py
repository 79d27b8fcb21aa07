"""The options of `rayos run` that say what hardware a machine has, and the table that they make."""

from __future__ import annotations

import argparse
from typing import Final, get_args

from rayos_vmm.config.load import Table
from rayos_vmm.config.spec import GpuModel, MachineKind, NetModel, WatchdogDevice

DEBUG_EXIT_PORT: Final = "0xf4"
#: Options that are a key of the machine's table, as they are.
_PLAIN: Final = ("cpu", "machine", "rtc", "icount", "seed", "watchdog_device")


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """The options, in a group of their own."""
    group = parser.add_argument_group("its hardware, for kernels that want some in particular")
    group.add_argument("--cpu", metavar="MODEL", help="model and features, such as max or qemu64,+rdrand")
    group.add_argument("--machine", choices=get_args(MachineKind), help="the board (default: q35)")
    group.add_argument(
        "--serial-ports", type=int, metavar="N", help="COM1 to COMN, each a console (default: 1)"
    )
    group.add_argument("--net-model", choices=get_args(NetModel), help="the network card (default: virtio)")
    group.add_argument(
        "-p",
        "--publish",
        action="append",
        metavar="[ADDRESS:]PORT:GUEST-PORT",
        help="carry connections to a port of the host to one of the guest's; again for more",
    )
    group.add_argument("--gpu-model", choices=get_args(GpuModel), help="the display (default: virtio)")
    group.add_argument(
        "--usb-input",
        action="append",
        choices=("keyboard", "mouse", "tablet"),
        help="one on USB, for a kernel with such a driver; again for more",
    )
    group.add_argument(
        "--no-offloads", action="store_true", help="a virtio card without checksum and segment offloads"
    )
    group.add_argument(
        "--debugcon", action="append", metavar="PORT", help="a debug console, such as 0xe9; again for more"
    )
    group.add_argument(
        "--debug-exit",
        nargs="?",
        const=DEBUG_EXIT_PORT,
        metavar="PORT",
        help="where a written V ends the machine with status (V << 1) | 1 (without PORT: 0xf4)",
    )
    group.add_argument("--pvpanic", choices=("pci", "isa", "none"), help="how a guest tells of its panic")
    group.add_argument(
        "--rtc", metavar="TIME", help="what its clock starts at: utc, localtime, 2038-01-19T03:14:00"
    )
    group.add_argument(
        "--icount", type=int, metavar="N", help="2^N ns an instruction: every run takes the same time"
    )
    group.add_argument("--seed", type=int, metavar="N", help="what QEMU's random numbers start from")
    group.add_argument(
        "--watchdog-device", choices=get_args(WatchdogDevice), help="a watchdog that resets the guest"
    )
    group.add_argument(
        "--qemu",
        action="append",
        metavar="ARGUMENT",
        help="an argument for QEMU, as it is (--qemu=-device --qemu=edu): nothing is promised about it",
    )


def hardware_table(args: argparse.Namespace) -> Table:
    """The keys that the options set; those of sub-tables as tables, to be laid over what is there."""
    table: Table = {key: value for key in _PLAIN if (value := getattr(args, key)) is not None}
    ports = {
        "serial": args.serial_ports,
        "debugcon": args.debugcon,
        "debug_exit": args.debug_exit,
        "pvpanic": args.pvpanic,
    }
    if asked := {key: value for key, value in ports.items() if value is not None}:
        table["ports"] = asked
    net: Table = {}
    if args.net_model is not None:
        net["model"] = args.net_model
    if args.no_offloads:
        net["offloads"] = False
    if args.publish:
        net["publish"] = args.publish
    if net:
        table["net"] = net
    if args.gpu_model is not None:
        table["gpu"] = {"model": args.gpu_model}
    if args.usb_input:
        table["input"] = {"usb": args.usb_input}
    if args.qemu:
        table["qemu_arguments"] = args.qemu
    return table


def lay_over(table: Table, asked: Table) -> None:
    """Puts what was asked for into a machine's table, sub-tables key by key."""
    for key, value in asked.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            table[key] = {**table[key], **value}
        else:
            table[key] = value

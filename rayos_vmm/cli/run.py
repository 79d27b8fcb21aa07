"""`rayos run`: from nothing to a guest's shell, or to the outcome of a command in it."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from rayos_vmm.cli.agent import guest_command, print_result
from rayos_vmm.cli.arguments import duration, size
from rayos_vmm.cli.boot import boot_table, show_boot
from rayos_vmm.cli.console import PORTS, port, port_number, say_goodbye
from rayos_vmm.cli.hardware import add_hardware, hardware_table, lay_over
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.progress import open_progress
from rayos_vmm.cli.terminal import Ending, attach
from rayos_vmm.client.client import Client
from rayos_vmm.client.daemon import ensure_daemon
from rayos_vmm.config.disk_words import parse_disk
from rayos_vmm.config.load import load, resolve_paths, to_spec
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Conflict, GuestGone, Invalid, NotFound, RayosError
from rayos_vmm.events import Event
from rayos_vmm.machine.view import ExitReason, VmView

DEFAULT_NAME: Final = "dev"
LAST_LINES: Final = 12
CLEAN_UP_S: Final = 30.0
FAILED_GUEST: Final = 5
GOOD_ENDS: Final = (ExitReason.POWERED_OFF, ExitReason.STOPPED, ExitReason.KILLED)


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.usage = "rayos run [OPTION …] [-- COMMAND [WORD …]]"
    parser.epilog = "With COMMAND the guest's agent runs it, the guest ends, and its exit status is ours."
    machine = parser.add_argument_group(
        "the machine (without --kernel, --cdrom and --firmware: RayOS's test guest)"
    )
    machine.add_argument("--name", help=f"its name (default: {DEFAULT_NAME}, or the next free one)")
    machine.add_argument("--kernel", metavar="FILE", help="a kernel: vmlinux, bzImage, multiboot ELF")
    machine.add_argument("--initrd", metavar="FILE", help="its initramfs")
    machine.add_argument("--append", metavar="TEXT", help="more of the kernel's command line")
    machine.add_argument("--memory", type=size, metavar="SIZE", help="such as 256MiB")
    machine.add_argument("--cpus", type=int, metavar="N", help="virtual processors")
    machine.add_argument(
        "--disk",
        action="append",
        metavar="SIZE|FILE|fat:DIR[,KEY=VALUE…]",
        help="an empty disk; an image, raw or by its name .qcow2, .vmdk, .vdi, .vhdx; or a directory as a FAT disk; "
        "with bus=ahci|ide|nvme|usb|scsi|floppy|sd, snapshot, read-only, cache=unsafe, …; again for more",
    )
    machine.add_argument("--cdrom", metavar="FILE", help="an ISO image to boot from")
    machine.add_argument("--firmware", metavar="FILE", help="firmware, such as OVMF.fd")
    machine.add_argument("--no-tpm", action="store_true", help="without a TPM")
    machine.add_argument("--no-net", action="store_true", help="without a network card")
    machine.add_argument("--no-gpu", action="store_true", help="without display, keyboard and mouse")
    machine.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file with [vm.NAME] and [service] tables"
    )
    add_hardware(parser)
    parser.add_argument("--rm", action="store_true", help="remove it when it stops")
    parser.add_argument("-d", "--detach", action="store_true", help="do not take its console")
    parser.add_argument(
        "--console",
        type=port,
        metavar="PORT",
        help=f"which console: one of {', '.join(PORTS)} (default: shell)",
    )
    parser.add_argument(
        "--timeout", type=duration, default=180.0, help="for the boot, and for COMMAND (default: 180s)"
    )


def _disk(text: str) -> dict[str, Any]:
    try:
        return parse_disk(text)
    except ValueError as error:
        raise Invalid(f"--disk {error}") from None


def _from_file(args: argparse.Namespace) -> dict[str, Any]:
    """The table of the configuration file that is meant, without its defaults."""
    if args.config is None:
        return {}
    vms = load(args.config).vms
    if not vms:
        return {}  # it is about the service alone
    name = args.name or (next(iter(vms)) if len(vms) == 1 else None)
    if name is None or name not in vms:
        raise Invalid(f"{args.config}: which machine? --name is {name}, the file has: {', '.join(vms)}")
    table: dict[str, Any] = msgspec.to_builtins(vms[name])
    return table


def to_table(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the table that the options and the file below them describe; without a name when none is given.

    Raises:
        Invalid: the file is wrong, or an option is.
    """
    table = _from_file(args)
    for key in ("name", "kernel", "initrd", "append", "memory", "cpus", "cdrom", "firmware"):
        value = getattr(args, key)
        if value is not None:
            table[key] = value
    if args.disk:
        table["disks"] = [_disk(text) for text in args.disk]
    lay_over(table, hardware_table(args))
    if args.no_tpm:
        table["tpm"] = False
    if args.no_net:
        table["net"] = {"enabled": False}
    if args.no_gpu:
        table["gpu"] = {"enabled": False}
    if args.rm:
        table["ephemeral"] = True
    return table


def _names(table: dict[str, Any]) -> Iterator[str]:
    if "name" in table:
        yield table["name"]
        return
    yield DEFAULT_NAME
    for number in count(2):
        yield f"{DEFAULT_NAME}-{number}"


async def _define(client: Client, table: dict[str, Any]) -> VmSpec:
    """Defines the machine under the first name that is free."""
    is_named = "name" in table
    for name in _names(table):
        spec = resolve_paths(to_spec(name, {**table, "name": name}, prefix="run"), Path.cwd())
        try:
            return (await client.create(spec)).spec
        except Conflict:
            if is_named:
                raise
    raise AssertionError("names do not end")


async def _boot(client: Client, spec: VmSpec, args: argparse.Namespace, out: Output) -> VmView:
    async with open_progress(f"starting {spec.name}", out) as progress, client.events() as events:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(show_boot, events, spec.name, progress)
            view = await client.act(spec.name, "start")
            if spec.is_our_guest:
                view = await client.wait(spec.name, "ready", timeout_s=args.timeout)
            nursery.cancel_scope.cancel()
    return view


async def _explain(client: Client, spec: VmSpec, error: RayosError, out: Output) -> None:
    """The guest's last lines, before the error that says what became of it."""
    try:
        lines = (await client.console_log(spec.name, PORTS["serial"])).decode(errors="replace").splitlines()
    except RayosError:
        return
    if lines and isinstance(error, GuestGone):
        out.note(f"the last that {spec.name} said on its serial line:")
        for line in lines[-LAST_LINES:]:
            out.note(f"  | {line}")


async def _clean_up(client: Client, spec: VmSpec, *, is_removed: bool) -> None:
    """The machine ends; and is gone, if it is to be removed."""
    with trio.move_on_after(CLEAN_UP_S) as scope:
        scope.shield = True
        with suppress(Conflict, NotFound):  # it had ended, or is gone
            await client.act(spec.name, "kill")
        if is_removed:
            with suppress(Conflict, NotFound):
                await client.remove(spec.name)


def _started(view: VmView, info: dict[str, Any], out: Output) -> None:
    accelerator, qemu = info.get("accelerator", {}), info.get("qemu", {})
    out.note(
        f"{view.spec.name} is {'ready' if view.is_ready else 'running'}"
        + (f" at {view.address}" if view.address else "")
        + f" (QEMU {qemu.get('version')}, {accelerator.get('name')}: {accelerator.get('reason')})"
    )
    for note in view.notes:
        out.note(f"note: {note}")
    out.note(boot_table(view))


async def _at_console(client: Client, spec: VmSpec, args: argparse.Namespace, out: Output) -> int:
    default = "shell" if spec.is_our_guest else "serial"
    chosen = PORTS[default] if args.console is None else await port_number(client, spec.name, args.console)
    async with client.events() as events:
        view = await client.get(spec.name)
        async with client.console(spec.name, chosen, since=0) as console:
            ending = await attach(console, "Ctrl-] detaches")
        if ending is not Ending.CONSOLE_ENDED:
            say_goodbye(spec.name, ending, out)
            if ending is Ending.INPUT_ENDED and spec.ephemeral:
                await _clean_up(client, spec, is_removed=True)
            return 0
        return await _how_it_ended(view, events, out)


async def _how_it_ended(view: VmView, events: AsyncIterator[Event], out: Output) -> int:
    """Waits for the end of a machine whose console has ended; the exit status for it."""
    reason, exit_reason = view.reason, view.exit_reason
    if view.exit_reason is None:
        async for event in events:
            if event.vm == view.spec.name and event.data.get("state") in ("stopped", "failed"):
                reason, exit_reason = str(event.data.get("reason", "")), ExitReason(event.data["exit_reason"])
                break
    out.note(f"{view.spec.name} ended: {reason}")
    return 0 if exit_reason in GOOD_ENDS else FAILED_GUEST


async def run_run(args: argparse.Namespace, out: Output) -> int:
    table = to_table(args)
    client = await ensure_daemon(["--config", str(args.config.absolute())] if args.config else [])
    async with open_progress("asking the daemon about its QEMU", out) as progress, client.events() as events:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(show_boot, events, "", progress)
            info = await client.info()
            nursery.cancel_scope.cancel()
    spec = await _define(client, table)
    try:
        view = await _boot(client, spec, args, out)
    except BaseException as error:
        # Also for an interrupt: what never ran is no machine to keep.
        if isinstance(error, RayosError):
            await _explain(client, spec, error, out)
        await _clean_up(client, spec, is_removed=True)
        raise
    if args.words:
        try:
            async with open_progress(f"running in {spec.name}", out):
                result = await client.exec(spec.name, guest_command(args.words), timeout_s=args.timeout)
        finally:
            await _clean_up(client, spec, is_removed=spec.ephemeral)
        return print_result(result, out)
    _started(view, info, out)
    if args.detach or out.is_json:
        out.result(view)
        return 0
    return await _at_console(client, spec, args, out)

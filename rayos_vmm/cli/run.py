"""`rayos run`: from nothing to a guest's shell, or to the outcome of a command in it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from rayos_vmm.cli.agent import guest_command, print_result
from rayos_vmm.cli.arguments import size
from rayos_vmm.cli.attended import (
    Attended,
    Life,
    clean_up,
    explain_end,
    interrupt_as_status,
    raise_signals,
)
from rayos_vmm.cli.boot import boot_table, show_boot
from rayos_vmm.cli.console import PORTS, port
from rayos_vmm.cli.exit_status import in_words
from rayos_vmm.cli.hardware import add_hardware, hardware_table, lay_over
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.progress import open_progress
from rayos_vmm.cli.verdict import add_verdict, verdict_table
from rayos_vmm.client.client import Client
from rayos_vmm.client.daemon import ensure_daemon
from rayos_vmm.config.disk_words import parse_disk
from rayos_vmm.config.load import Table, load, resolve_paths, to_spec
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Conflict, Invalid, RayosError, one_error
from rayos_vmm.machine.view import VmView
from rayos_vmm.service.view import Info

DEFAULT_NAME: Final = "dev"
OUR_TIMEOUT_S: Final = 180.0


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.usage = "rayos run [OPTION …] [-- COMMAND [WORD …]]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    command = "With COMMAND the guest's agent runs it, the guest ends, and its exit status is ours."
    parser.epilog = f"{command}\n\n{in_words()}"
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
    add_verdict(parser)


def _disk(text: str) -> Table:
    try:
        return parse_disk(text)
    except ValueError as error:
        raise Invalid(f"--disk {error}") from None


def _from_file(args: argparse.Namespace) -> Table:
    """The table of the configuration file that is meant, without its defaults."""
    if args.config is None:
        return {}
    vms = load(args.config).vms
    if not vms:
        return {}  # it is about the service alone
    name = args.name or (next(iter(vms)) if len(vms) == 1 else None)
    if name is None or name not in vms:
        raise Invalid(f"{args.config}: which machine? --name is {name}, the file has: {', '.join(vms)}")
    table: Table = msgspec.to_builtins(vms[name])
    return table


def to_table(args: argparse.Namespace) -> Table:
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
    lay_over(table, verdict_table(args))
    return table


def _names(table: Table) -> Iterator[str]:
    if "name" in table:
        yield table["name"]
        return
    yield DEFAULT_NAME
    for number in count(2):
        yield f"{DEFAULT_NAME}-{number}"


async def _define(client: Client, table: Table, limit_s: float | None) -> VmSpec:
    """Defines the machine under the first name that is free; `limit_s` is for a run of what is not our guest."""
    is_named = "name" in table
    for name in _names(table):
        spec = resolve_paths(to_spec(name, {**table, "name": name}, prefix="run"), Path.cwd())
        if limit_s is not None and not spec.is_our_guest:
            watchdog = msgspec.structs.replace(spec.watchdog, run=f"{limit_s:.3f}s")
            spec = msgspec.structs.replace(spec, watchdog=watchdog)
        try:
            return (await client.create(spec)).spec
        except Conflict:
            if is_named:
                raise
    raise AssertionError("names do not end")


async def _boot(client: Client, spec: VmSpec, args: argparse.Namespace, out: Output) -> VmView:
    async with open_progress(f"starting {spec.name}", out) as progress, client.events() as events:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(show_boot, events, spec.name, progress, has_tpm=bool(spec.tpm)))
            view = await client.act(spec.name, "start")
            if spec.is_our_guest:
                view = await client.wait(spec.name, "ready", timeout_s=args.timeout or OUR_TIMEOUT_S)
            nursery.cancel_scope.cancel()
    return view


async def _boot_or_remove(client: Client, spec: VmSpec, args: argparse.Namespace, out: Output) -> VmView:
    """Boots a machine; one that never ran, also for an interrupt, is no machine to keep."""
    try:
        return await _boot(client, spec, args, out)
    except BaseException as error:
        if isinstance(error, RayosError):
            await explain_end(client, spec.name, error, out)
        await clean_up(client, spec.name, is_removed=True)
        raise


def _started(view: VmView, info: Info, out: Output) -> None:
    out.note(
        f"{view.spec.name} is {'ready' if view.is_ready else 'running'}"
        + (f" at {view.address}" if view.address else "")
        + f" (QEMU {info.qemu.version}, {info.accelerator.name}: {info.accelerator.reason})"
    )
    for note in view.notes:
        out.note(f"note: {note}")
    out.note(boot_table(view))


async def _command(client: Client, spec: VmSpec, args: argparse.Namespace, out: Output) -> int:
    try:
        async with open_progress(f"running in {spec.name}", out):
            limit_s = args.timeout or OUR_TIMEOUT_S
            result = await client.exec(spec.name, guest_command(args.words), timeout_s=limit_s)
    finally:
        await clean_up(client, spec.name, is_removed=spec.ephemeral)
    return print_result(result, out)


async def _held(client: Client, spec: VmSpec, args: argparse.Namespace, out: Output, info: Any) -> int:
    """From the start to the end, with the machine held; whatever ends us ends it."""
    is_done = False
    try:
        async with client.hold(spec.name) as views, trio.open_nursery() as nursery:
            nursery.start_soon(raise_signals)
            life = Life(views, await anext(aiter(views)))
            nursery.start_soon(life.follow)
            view = await _boot_or_remove(client, spec, args, out)
            if args.words:
                status = await _command(client, spec, args, out)
            else:
                _started(view, info, out)
                status = await Attended(client, spec, args, out).run(life)
            is_done = True
            nursery.cancel_scope.cancel()
    finally:
        if not is_done:
            await clean_up(client, spec.name, is_removed=spec.ephemeral)
    return status


async def _detached(client: Client, spec: VmSpec, args: argparse.Namespace, out: Output, info: Any) -> int:
    view = await _boot_or_remove(client, spec, args, out)
    _started(view, info, out)
    out.result(view)
    return 0


async def run_run(args: argparse.Namespace, out: Output) -> int:
    table = to_table(args)
    client = await ensure_daemon(["--config", str(args.config.absolute())] if args.config else [])
    async with open_progress("asking the daemon about its QEMU", out) as progress, client.events() as events:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(show_boot, events, "", progress)
            info = await client.info()
            nursery.cancel_scope.cancel()
    spec = await _define(client, table, args.timeout)
    # With --json our guest's shell is no result: the machine is, once it is ready.
    if args.detach or (out.is_json and spec.is_our_guest and not args.words):
        return await _detached(client, spec, args, out, info)
    with interrupt_as_status() as interrupted, one_error():
        return await _held(client, spec, args, out, info)
    return interrupted[0]

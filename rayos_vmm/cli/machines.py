"""Machines as wholes: list, start, stop, remove, wait."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import trio

from rayos_vmm.cli.arguments import duration
from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.console import add_port, port_number
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.progress import open_progress
from rayos_vmm.client.client import Client, NoDaemon, Verb
from rayos_vmm.client.daemon import ensure_daemon, the_daemon
from rayos_vmm.errors import Conflict, GuestGone, Timeout_
from rayos_vmm.machine.view import VmState, VmView
from rayos_vmm.paths import default_paths
from rayos_vmm.service.store import read_records
from rayos_vmm.shared.console_text import Finder


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def describe(view: VmView) -> str:
    """A machine's state in a few words."""
    if view.state is VmState.RUNNING:
        return "ready" if view.is_ready else "running"
    return f"{view.state}" + (f": {view.reason}" if view.reason else "")


def add_ps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="names only")


async def _machines(out: Output) -> list[VmView]:
    """The machines as the daemon has them; without a daemon, as it left them."""
    try:
        return await the_daemon().machines()
    except NoDaemon:
        if os.environ.get("RAYOS_SOCKET"):
            raise
    views = [one.view() for one in await trio.to_thread.run_sync(read_records, default_paths().database)]
    if views:
        out.note(
            "no daemon runs: this is what the last one left; `rayos start` or `rayos serve` starts another"
        )
    return views


async def run_ps(args: argparse.Namespace, out: Output) -> None:
    views = await _machines(out)
    if args.quiet:
        out.result([view.spec.name for view in views], "\n".join(view.spec.name for view in views) or None)
        return
    rows = [
        (
            view.spec.name,
            describe(view),
            view.address or "-",
            view.spec.memory,
            str(view.spec.cpus),
            _age(time.time() - view.started) if view.pid and view.started else "-",
        )
        for view in views
    ]
    out.table(views, ("NAME", "STATE", "ADDRESS", "MEMORY", "CPUS", "UP"), rows)


async def _verb(args: argparse.Namespace, out: Output, verb: Verb, doing: str) -> None:
    client = await ensure_daemon([])
    async with open_progress(f"{doing} {args.name}", out):
        view = await client.act(args.name, verb)
    out.result(view, f"{args.name} is {describe(view)}")


def add_start(parser: argparse.ArgumentParser) -> None:
    add_name(parser)


async def run_start(args: argparse.Namespace, out: Output) -> None:
    await _verb(args, out, "start", "starting")


def add_stop(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "--timeout", type=duration, default=20.0, help="then QEMU is told to quit (default: 20s)"
    )


async def run_stop(args: argparse.Namespace, out: Output) -> None:
    async with open_progress(f"stopping {args.name}", out):
        view = await the_daemon().stop(args.name, timeout_s=args.timeout)
    out.result(view, f"{args.name} is {describe(view)}")


def add_kill(parser: argparse.ArgumentParser) -> None:
    add_name(parser)


async def run_kill(args: argparse.Namespace, out: Output) -> None:
    await _verb(args, out, "kill", "ending")


def add_pause(parser: argparse.ArgumentParser) -> None:
    add_name(parser)


async def run_pause(args: argparse.Namespace, out: Output) -> None:
    await _verb(args, out, "pause", "pausing")


def add_resume(parser: argparse.ArgumentParser) -> None:
    add_name(parser)


async def run_resume(args: argparse.Namespace, out: Output) -> None:
    await _verb(args, out, "resume", "resuming")


def add_reset(parser: argparse.ArgumentParser) -> None:
    add_name(parser)


async def run_reset(args: argparse.Namespace, out: Output) -> None:
    await _verb(args, out, "reset", "resetting")


def add_rm(parser: argparse.ArgumentParser) -> None:
    add_name(parser, nargs="+")
    parser.add_argument("-f", "--force", action="store_true", help="end it first if it runs")


async def _remove(client: Client, name: str, *, is_forced: bool) -> None:
    try:
        await client.remove(name)
    except Conflict:
        if not is_forced:
            raise
        ended = await client.act(name, "kill")
        if not ended.spec.ephemeral:
            await client.remove(name)


async def run_rm(args: argparse.Namespace, out: Output) -> None:
    client = await ensure_daemon([])
    removed: list[Any] = []
    for name in args.name:
        async with open_progress(f"removing {name}", out):
            await _remove(client, name, is_forced=args.force)
        removed.append(name)
    out.result({"removed": removed})


def add_wait(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "--for",
        dest="condition",
        choices=("ready", "running", "stopped"),
        default="ready",
        help="what to wait for (default: ready)",
    )
    parser.add_argument(
        "--for-text",
        metavar="REGEX",
        help="what a console has printed, or prints now; at any time since the start",
    )
    add_port(parser, "serial")
    parser.add_argument("--timeout", type=duration, default=60.0, help="how long (default: 60s)")


async def _wait_for_text(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    finder = Finder([args.for_text])
    number = await port_number(client, args.name, args.port)
    with trio.move_on_after(args.timeout):
        async with client.console(args.name, number, since=0, mode="watch") as console:
            while data := await console.read():
                found = finder.feed(data)
                if found is not None:
                    out.result({"match": found.text, "line": found.line}, found.line)
                    return
        reason = (await client.get(args.name)).reason
        raise GuestGone(f"the console of {args.name} ended and had not printed {args.for_text!r}: {reason}")
    raise Timeout_(f"{args.name} did not print {args.for_text!r} within {args.timeout:g} s")


async def run_wait(args: argparse.Namespace, out: Output) -> None:
    if args.for_text is not None:
        async with open_progress(f"waiting until {args.name} prints {args.for_text!r}", out):
            await _wait_for_text(args, out)
        return
    async with open_progress(f"waiting until {args.name} is {args.condition}", out):
        view = await the_daemon().wait(args.name, args.condition, timeout_s=args.timeout)
    out.result(view, f"{args.name} is {describe(view)}")

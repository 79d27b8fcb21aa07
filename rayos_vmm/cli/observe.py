"""Events, statistics, leases, and QEMU's own monitor."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import msgspec

from rayos_vmm.cli.completion import add_name, machine_names
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.errors import Invalid
from rayos_vmm.events import Event


def _sentence(event: Event) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    data = " ".join(f"{key}={value}" for key, value in event.data.items())
    return f"{event.seq:>6} {clock}.{int(event.time % 1 * 1000):03} {event.vm or '-':<12} {event.type} {data}".rstrip()


def add_events(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument("name", nargs="?", metavar="NAME", help="of one machine only")
    action.completer = machine_names  # type: ignore[attr-defined]  # argcomplete's convention
    parser.add_argument(
        "--since", type=int, help="after this number; 0: all that is kept (default: from now on)"
    )


async def run_events(args: argparse.Namespace, out: Output) -> None:
    async with the_daemon().events(args.since) as events:
        async for event in events:
            if args.name in (None, event.vm) or event.type == "gap":
                out.line(event, _sentence(event))


def add_stats(parser: argparse.ArgumentParser) -> None:
    add_name(parser)


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of (path, value)."""
    if isinstance(value, dict) and value:
        pairs: list[tuple[str, Any]] = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return [(prefix, "-" if value in ("", None, [], {}) else str(value))]
    return [row for key, inner in pairs for row in flatten(inner, f"{prefix}.{key}" if prefix else key)]


async def run_stats(args: argparse.Namespace, out: Output) -> None:
    stats = await the_daemon().stats(args.name)
    out.table(stats, ("COUNTER", "VALUE"), flatten(stats))


def add_leases(parser: argparse.ArgumentParser) -> None:
    """Takes nothing but --json."""


async def run_leases(args: argparse.Namespace, out: Output) -> None:
    leases = await the_daemon().leases()
    rows = [
        (
            lease["address"],
            lease["mac"],
            lease["state"],
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease["expires"])),
            lease["host_name"] or "-",
        )
        for lease in leases
    ]
    out.table(leases, ("ADDRESS", "MAC", "STATE", "EXPIRES", "HOST NAME"), rows)


def add_qmp(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "qmp", metavar="COMMAND", nargs="?", help="such as query-status (default: show what was said so far)"
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="KEY=VALUE",
        help="arguments; a value that is JSON is that, else a string",
    )


def qmp_arguments(words: list[str]) -> dict[str, Any] | None:
    """`KEY=VALUE` words, or one JSON object, as the command's arguments."""
    if len(words) == 1 and words[0].startswith("{"):
        try:
            return msgspec.json.decode(words[0], type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise Invalid(f"{words[0]!r} is not a JSON object: {error}") from None
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise Invalid(
                f"{word!r} is not KEY=VALUE",
                hint="rayos qmp dev device_del id=disk0",
            )
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments or None


async def run_qmp(args: argparse.Namespace, out: Output) -> None:
    if args.qmp is None:
        said = await the_daemon().qmp_transcript(args.name)
        out.result([msgspec.json.decode(line) for line in said.splitlines()], said.rstrip("\n"))
        return
    returned = await the_daemon().qmp(args.name, args.qmp, qmp_arguments(args.arguments))
    out.result(returned, msgspec.json.format(msgspec.json.encode(returned), indent=2).decode())

"""QEMU's own monitor: a QMP command, or the transcript of what was said."""

from __future__ import annotations

import argparse
import json

import msgspec

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.load import Table
from rayos_vmm.errors import Invalid


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


def qmp_arguments(words: list[str]) -> Table | None:
    """`KEY=VALUE` words, or one JSON object, as the command's arguments."""
    if len(words) == 1 and words[0].startswith("{"):
        try:
            return msgspec.json.decode(words[0], type=Table)
        except msgspec.DecodeError as error:
            raise Invalid(f"{words[0]!r} is not a JSON object: {error}") from None
    arguments: Table = {}
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

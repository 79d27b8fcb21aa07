"""Consoles: take one, or read what it has said."""

from __future__ import annotations

import argparse
import sys

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.daemon import the_daemon
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.terminal import Ending, attach

PORTS = {"shell": 0, "agent": 1, "log": 2, "serial": 3}


def port(text: str) -> int:
    """A console port by its name or number."""
    if text in PORTS:
        return PORTS[text]
    if text.isdecimal() and int(text) <= 31:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port: one of {', '.join(PORTS)}, or 0 to 31")


def add_port(parser: argparse.ArgumentParser, default: str) -> None:
    """The argument that chooses a console."""
    parser.add_argument(
        "--port",
        type=port,
        default=PORTS[default],
        metavar="PORT",
        help=f"one of {', '.join(PORTS)}, or a number (default: {default})",
    )


def add_console(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    add_port(parser, "shell")
    parser.add_argument("--no-replay", action="store_true", help="do not show what was said before")


async def run_console(args: argparse.Namespace, out: Output) -> None:
    async with the_daemon().console(args.name, args.port, since=None if args.no_replay else 0) as console:
        ending = await attach(console, f"the console of {args.name}; Ctrl-] detaches")
    say_goodbye(args.name, ending, out)


def say_goodbye(name: str, ending: Ending, out: Output) -> None:
    """A line after the guest's last, which may not have ended."""
    if ending is Ending.DETACHED:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        out.note(f"detached; {name} goes on. Back: rayos console {name}; end it: rayos stop {name}")


def add_logs(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    add_port(parser, "log")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the console ends")


async def run_logs(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if not args.follow:
        kept = await client.console_log(args.name, args.port)
        if out.is_json:
            out.result({"port": args.port, "text": kept.decode(errors="replace")})
        else:
            out.write(kept)
        return
    async with client.console(args.name, args.port, since=0) as console:
        while data := await console.read():
            if out.is_json:
                out.line({"offset": console.offset - len(data), "text": data.decode(errors="replace")}, "")
            else:
                out.write(data)

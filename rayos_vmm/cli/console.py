"""Consoles: take one, or read what it has said."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from rayos_vmm.cli.cast import Asciicast, Stamps
from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.terminal import Ending, attach, watch
from rayos_vmm.client.client import Client
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.spec import is_port_name
from rayos_vmm.errors import NotFound
from rayos_vmm.guest.view import ConsolePort
from rayos_vmm.machine.line import LINE_PORTS
from rayos_vmm.machine.seats import Preference
from rayos_vmm.machine.view import VmState

_ENDED: Final = (VmState.STOPPED, VmState.FAILED)
#: What a port may be called; others by the name that the machine's configuration gives them.
PORTS: Final = {"shell": 0, "agent": 1, "log": 2, **LINE_PORTS}


def port(text: str) -> int | str:
    """A console port by its number, or its name."""
    if text in PORTS:
        return PORTS[text]
    if text.isdecimal() and int(text) <= max(PORTS.values()):
        return int(text)
    if is_port_name(text):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a port: one of {', '.join(PORTS)}, 0 to {max(PORTS.values())}, or a name"
    )


def add_port(parser: argparse.ArgumentParser, default: str) -> None:
    """The argument that chooses a console."""
    parser.add_argument(
        "--port",
        type=port,
        default=PORTS[default],
        metavar="PORT",
        help=f"one of {', '.join(PORTS)}, a number, or a name of the machine's own (default: {default})",
    )


async def port_number(client: Client, name: str, chosen: int | str) -> int:
    """The number of a port of a machine.

    Raises:
        NotFound: it has none of that name.
    """
    if isinstance(chosen, int):
        return chosen
    names = (await client.get(name)).spec.console_ports
    if chosen not in names:
        raise NotFound(
            f"{name} has no console port {chosen!r}; it has {', '.join(names)}", code="no_such_port"
        )
    return names.index(chosen)


def add_console(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    add_port(parser, "shell")
    parser.add_argument("--no-replay", action="store_true", help="do not show what was said before")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--take", action="store_true", help="take over from whoever writes there; he watches on"
    )
    mode.add_argument("--watch", action="store_true", help="do not write")
    mode.add_argument("--list", action="store_true", help="list the ports, and who sits there")


async def run_console(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.list:
        ports = await client.console_ports(args.name)
        out.table(ports, ("PORT", "NAME", "OPEN", "SIZE", "WRITER", "WATCHERS"), [_row(one) for one in ports])
        return
    number = await port_number(client, args.name, args.port)
    since = None if args.no_replay else 0
    mode: Preference = "take" if args.take else "watch" if args.watch else "write"
    async with client.console(args.name, number, since=since, mode=mode) as console:
        if args.watch and not sys.stdin.isatty():
            ending = await watch(console)
        else:
            ending = await attach(console, f"the console of {args.name}; Ctrl-] detaches")
    say_goodbye(args.name, ending, out)


def _row(one: ConsolePort) -> tuple[str, ...]:
    size = f"{one.columns}x{one.rows}" if one.columns else "-"
    is_open = "yes" if one.guest_open else "no"
    return str(one.port), one.name, is_open, size, one.writer or "-", str(one.watchers)


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
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("-t", "--timestamps", action="store_true", help="the time before each line")
    shape.add_argument(
        "--format",
        choices=("text", "asciicast"),
        default="text",
        help="asciicast: version 2, for `asciinema play`; its text is the output byte for byte (surrogateescape)",
    )


async def run_logs(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    number = await port_number(client, args.name, args.port)
    if number < PORTS["serial"] and (await client.get(args.name)).state in _ENDED:
        out.note(f"{args.name} has ended, and its virtio console with it: this is its serial line")
        number = PORTS["serial"]
    if args.format == "asciicast":
        sizes = {one.port: (one.columns, one.rows) for one in await client.console_ports(args.name)}
        writer: Asciicast | Stamps = Asciicast(args.name, *sizes[number])
    elif args.timestamps:
        writer = Stamps()
    else:
        await _plain_log(client, args, number, out)
        return
    async with client.console_pieces(args.name, number, follow=args.follow) as pieces:
        async for piece in pieces:
            if out.is_json and args.timestamps:
                data = piece.data.decode(errors="replace")
                out.line({"offset": piece.offset, "time": piece.time, "text": data}, "")
            else:
                out.write(writer.feed(piece))
    if not out.is_json or args.format == "asciicast":
        out.write(writer.finish())


async def _plain_log(client: Client, args: argparse.Namespace, number: int, out: Output) -> None:
    if not args.follow:
        kept = await client.console_log(args.name, number)
        if out.is_json:
            out.result({"port": number, "text": kept.decode(errors="replace")})
        else:
            out.write(kept)
        return
    async with client.console(args.name, number, since=0, mode="watch") as console:
        while data := await console.read():
            if out.is_json:
                out.line({"offset": console.offset - len(data), "text": data.decode(errors="replace")}, "")
            else:
                out.write(data)

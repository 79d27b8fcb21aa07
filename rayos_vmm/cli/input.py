"""The guest's keyboard, mouse, tablet and touch screen."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import BinaryIO, Final, get_args

import msgspec
import trio

from rayos_vmm.cli.arguments import duration
from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.progress import open_progress
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.load import Table
from rayos_vmm.config.spec import Layout
from rayos_vmm.errors import Invalid
from rayos_vmm.guest.view import InputDevice
from rayos_vmm.machine.recording import FORMAT, STEPS_MAXIMUM, Step

_BUTTONS: Final = ("left", "right", "middle")
FILE_MAXIMUM_BYTES: Final = 16 << 20


def add_type(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument("text", help="what to type")
    parser.add_argument("--enter", action="store_true", help="press Enter at the end")
    parser.add_argument(
        "--layout",
        choices=get_args(Layout),
        help="the keyboard layout that the guest has loaded (default: the machine's, else us)",
    )


async def run_type(args: argparse.Namespace, out: Output) -> None:
    async with open_progress(f"typing on {args.name}", out):
        text = args.text + ("\n" if args.enter else "")
        to = await the_daemon().type_text(args.name, text, layout=args.layout)
    out.result({"typed": len(args.text), "to": to})


def add_key(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "combo", nargs="+", help="keys to press together, such as ctrl-alt-delete; one after the other"
    )


async def run_key(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    for combo in args.combo:
        to = await client.send_key(args.name, combo)
    out.result({"pressed": args.combo, "to": to})


def add_input(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="show|point|mouse|touch|record|replay", required=True)
    show = verbs.add_parser("show", help="the devices: lights, what is held down, what waits")
    point = verbs.add_parser("point", help="move the tablet's pointer, and click")
    mouse = verbs.add_parser("mouse", help="move the mouse, and click")
    touch = verbs.add_parser("touch", help="put fingers on the touch screen, and lift them")
    record = verbs.add_parser("record", help="write down what reaches the devices, whoever sends it")
    replay = verbs.add_parser("replay", help="do a recording again")
    for sub in (show, point, mouse, touch, record, replay):
        add_name(sub)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    for axis in "xy":
        point.add_argument(axis, type=float, help=f"{axis} as a share of the display, 0 to 1")
        mouse.add_argument(f"d{axis}", type=int, help=f"steps along {axis}")
    mouse.add_argument("--wheel", type=int, default=0, metavar="N", help="turn the wheel, up is positive")
    for sub in (point, mouse):
        buttons = sub.add_mutually_exclusive_group()
        buttons.add_argument("--click", choices=_BUTTONS, help="press and release this button there")
        buttons.add_argument("--hold", choices=_BUTTONS, action="append", default=[], help="keep it down")
    touch.add_argument(
        "point", nargs="*", type=_point, metavar="X,Y", help="shares of the display; none lifts all"
    )
    touch.add_argument("--hold", action="store_true", help="do not lift the fingers")
    record.add_argument("file", help="JSON lines; - for standard output")
    record.add_argument(
        "--for", dest="limit", type=duration, metavar="TIME", help="stop after it (default: Ctrl-C)"
    )
    replay.add_argument("file", help="what `rayos input record` wrote; - for standard input")
    replay.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="so many times as fast (default: 1)"
    )


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no place: such as 0.5,0.25") from None
    return x, y


async def run_input(args: argparse.Namespace, out: Output) -> None:
    client, name = the_daemon(), args.name
    match args.verb:
        case "show":
            devices = await client.input_devices(name)
            out.table(
                devices,
                ("DEVICE", "KIND", "LIGHTS", "HELD", "WAITING", "DROPPED"),
                [_row(one) for one in devices],
            )
            return
        case "point":
            await client.pointer(name, args.x, args.y, _buttons(args))
            if args.click:
                await client.pointer(name, args.x, args.y)
        case "mouse":
            await client.mouse(name, args.dx, args.dy, wheel=args.wheel, buttons=_buttons(args))
            if args.click:
                await client.mouse(name, 0, 0)
        case "touch":
            await client.touch(name, args.point)
            if not args.hold:
                await client.touch(name, [])
        case "record":
            await _record(args, out)
            return
        case _:
            steps = read_recording(args.file)
            async with open_progress(f"replaying {args.file} on {name}", out):
                await client.input_replay(name, steps, speed=args.speed)
            out.result({"steps": len(steps)})
            return
    out.result({})


def _buttons(args: argparse.Namespace) -> tuple[str, ...]:
    return (args.click,) if args.click else tuple(args.hold)


def _row(one: InputDevice) -> tuple[str, ...]:
    return (
        one.device,
        one.kind,
        " ".join(one.leds) or "-",
        " ".join(one.held) or "-",
        f"{one.waiting_events} of {one.queue_limit}",
        str(one.dropped),
    )


def _open(name: str) -> BinaryIO:
    try:
        return sys.stdout.buffer if name == "-" else Path(name).open("wb")
    except OSError as error:
        raise Invalid(f"{name}: {error.strerror}") from None


async def _record(args: argparse.Namespace, out: Output) -> None:
    """Until the time is up, the machine ends, the file is full or Ctrl-C; every line is whole."""
    file = _open(args.file)
    steps = 0
    try:
        with trio.move_on_after(args.limit if args.limit is not None else float("inf")):
            async with the_daemon().input_record(args.name) as recorded:
                file.write(msgspec.json.encode({**FORMAT, "vm": args.name}) + b"\n")
                file.flush()
                out.note(f"recording what reaches {args.name}'s input devices; Ctrl-C ends it")
                async for step in recorded:
                    file.write(msgspec.json.encode(step) + b"\n")
                    file.flush()
                    steps += 1
                    if steps == STEPS_MAXIMUM:
                        out.note(f"{steps} steps are the most that one replay takes: ended")
                        break
    finally:
        if args.file != "-":
            file.close()
            out.result({"file": args.file, "steps": steps}, f"{args.file}: {steps} steps")


def read_recording(name: str) -> list[Step]:
    """The steps in a file of `rayos input record`.

    Raises:
        Invalid: it cannot be read, is too long, or a line (whose number is said) is none.
    """
    try:
        with sys.stdin.buffer if name == "-" else Path(name).open("rb") as file:
            data = file.read(FILE_MAXIMUM_BYTES + 1)
    except OSError as error:
        raise Invalid(f"{name}: {error.strerror}") from None
    if len(data) > FILE_MAXIMUM_BYTES:
        raise Invalid(f"{name} has more than {FILE_MAXIMUM_BYTES} bytes")
    first, *lines = data.splitlines() or [b""]
    try:
        header = msgspec.json.decode(first, type=Table)
    except msgspec.DecodeError:
        header = {}
    if {key: header.get(key) for key in FORMAT} != FORMAT:
        raise Invalid(f"{name} does not begin with {msgspec.json.encode(FORMAT).decode()}")
    steps = []
    for number, line in enumerate(lines, 2):
        try:
            steps.append(msgspec.json.decode(line, type=Step))
        except msgspec.DecodeError as error:
            raise Invalid(f"{name}, line {number}: {error}") from None
    if len(steps) > STEPS_MAXIMUM:
        raise Invalid(f"{name} has {len(steps)} steps; at most {STEPS_MAXIMUM} are replayed at a time")
    return steps

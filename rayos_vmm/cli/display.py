"""A guest's monitors: pictures, what changed, modes."""

from __future__ import annotations

import argparse

from rayos_vmm.cli.arguments import duration
from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.files import write_file
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.spec import parse_mode
from rayos_vmm.shared.view import Size


def add_display(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="show|resize|damage", required=True)
    show = verbs.add_parser("show", help="the monitors: mode, picture, cursor")
    resize = verbs.add_parser("resize", help="have a monitor prefer another mode, and tell the guest")
    damage = verbs.add_parser("damage", help="wait until a picture changes, and say where")
    for sub in (show, resize, damage):
        add_name(sub)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    resize.add_argument("mode", type=_mode, metavar="WxH", help="in pixels, such as 1920x1080")
    add_scanout(resize)
    damage.add_argument("--since", type=int, metavar="SERIAL", help="after this change (default: now)")
    damage.add_argument("--timeout", type=duration, default=60.0, help="how long to wait (default: 60s)")
    add_scanout(damage)


def add_scanout(parser: argparse.ArgumentParser) -> None:
    """The argument that chooses a monitor."""
    parser.add_argument("--scanout", type=int, default=0, metavar="N", help="which monitor (default: 0)")


def _mode(text: str) -> tuple[int, int]:
    try:
        return parse_mode(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(pair: Size) -> str:
    return f"{pair.width}x{pair.height}"


async def run_display(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    match args.verb:
        case "show":
            info = await client.display(args.name)
            rows = [
                (
                    str(one.scanout),
                    _size(one.mode),
                    _size(one.picture) if one.is_on else "off",
                    f"{one.cursor.x},{one.cursor.y}" if one.cursor else "-",
                )
                for one in info.scanouts
            ]
            out.table(info, ("SCANOUT", "MODE", "PICTURE", "CURSOR"), rows)
        case "resize":
            width, height = args.mode
            await client.resize(args.name, width, height, args.scanout)
            out.result({"scanout": args.scanout, "width": width, "height": height})
        case _:
            since = args.since
            if since is None:
                since = (await client.display(args.name)).serial
            damage = await client.wait_damage(args.name, since, args.scanout, timeout_s=args.timeout)
            out.result(
                damage, f"{damage.serial}: {damage.width}x{damage.height} pixels at {damage.x},{damage.y}"
            )


def add_screenshot(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument("file", nargs="?", help="where to save it; - for standard output (default: NAME.png)")
    parser.add_argument("--cursor", action="store_true", help="draw the guest's cursor into it")
    add_scanout(parser)


async def run_screenshot(args: argparse.Namespace, out: Output) -> None:
    picture = await the_daemon().screenshot(args.name, scanout=args.scanout, with_cursor=args.cursor)
    if args.file == "-":
        out.write(picture)
        return
    path = write_file(args.file or f"{args.name}.png", picture)
    out.result({"file": str(path), "bytes": len(picture)}, str(path))

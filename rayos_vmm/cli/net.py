"""A machine's network card: what it is, its cable, what passes through it."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import msgspec
import trio

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output, flatten
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.contract import asks, operations
from rayos_vmm.errors import Invalid
from rayos_vmm.guest.pcapng import Tally


def add_net(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="show|link|announce|capture", required=True)
    show = verbs.add_parser("show", help="the card, its cable, what the guest asked of it")
    link = verbs.add_parser("link", help="plug the cable in, or pull it")
    announce = verbs.add_parser("announce", help="have the guest announce its addresses")
    capture = verbs.add_parser("capture", help="what passes the card, live, as pcapng (tcpdump -r -)")
    for sub in (show, link, announce, capture):
        add_name(sub)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    link.add_argument("state", choices=("up", "down"))
    capture.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where to (default: standard output)"
    )
    capture.add_argument("--count", type=int, metavar="N", help="end after so many frames (default: Ctrl-C)")
    capture.add_argument("--snap", type=int, metavar="BYTES", help="keep so much of a frame (default: all)")


async def run_net(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.verb == "capture":
        await _capture(args, out)
        return
    if args.verb == "announce":
        await client.call(operations.NET_ANNOUNCE, args.name)
        out.result({"announced": args.name}, f"{args.name} was told to announce itself")
    elif args.verb == "link":
        view = await client.call(operations.NET_LINK, args.name, body=asks.Link(up=args.state == "up"))
        out.result(view, f"the link of {args.name} is {'up' if view.is_up else 'down'}")
    else:
        view = await client.call(operations.NET_VIEW, args.name)
        out.table(view, ("CARD", "VALUE"), flatten(msgspec.to_builtins(view)))


async def _capture(args: argparse.Namespace, out: Output) -> None:
    """Until the count is reached, the machine ends or a signal comes: what came until then is whole."""
    if args.output is None and (out.is_json or os.isatty(1)):
        raise Invalid(
            "a capture is binary", hint=f"rayos net capture {args.name} --output FILE, or | tcpdump -r -"
        )
    target = 1 if args.output is None else os.open(args.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    tally = Tally()
    try:
        async with trio.open_nursery() as nursery:

            async def end_on_signal() -> None:
                with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    async for _ in signals:
                        nursery.cancel_scope.cancel()

            nursery.start_soon(end_on_signal)
            async with the_daemon().capture(args.name, snap=args.snap, count=args.count) as pieces:
                async for piece in pieces:
                    tally.add(piece)
                    _write(target, piece)
            nursery.cancel_scope.cancel()
    except* BrokenPipeError:
        pass  # whoever read it has seen enough
    finally:
        if args.output is not None:
            os.close(target)
    where = None if args.output is None else str(args.output)
    counted = {"file": where, "frames": tally.frames, "lost": tally.lost, "bytes": tally.size}
    if out.is_json:
        out.result(counted)
    out.note(f"{tally.frames} frames, {tally.lost} lost before them")


def _write(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]

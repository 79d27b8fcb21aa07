"""The guest's keyboard."""

from __future__ import annotations

import argparse

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.daemon import the_daemon
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.progress import open_progress


def add_type(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument("text", help="what to type")
    parser.add_argument("--enter", action="store_true", help="press Enter at the end")


async def run_type(args: argparse.Namespace, out: Output) -> None:
    async with open_progress(f"typing on {args.name}", out):
        await the_daemon().type_text(args.name, args.text + ("\n" if args.enter else ""))
    out.result({"typed": len(args.text)})


def add_key(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "combo", nargs="+", help="keys to press together, such as ctrl-alt-delete; one after the other"
    )


async def run_key(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    for combo in args.combo:
        await client.send_key(args.name, combo)
    out.result({"pressed": args.combo})

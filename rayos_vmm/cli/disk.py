"""A machine's disks: what they are, and making one larger."""

from __future__ import annotations

import argparse

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.units import format_size


def add_disk(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="list|resize", required=True)
    listing = verbs.add_parser("list", help="the disks, their size, what they take of the host's storage")
    resize = verbs.add_parser("resize", help="make a disk larger; a running guest sees it at once")
    for sub in (listing, resize):
        add_name(sub)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    resize.add_argument("size", metavar="SIZE", help="the new size, such as 2GiB")
    resize.add_argument("--disk", type=int, default=0, metavar="N", help="which disk (0, the first)")


async def run_disk(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.verb == "resize":
        resized = await client.resize_disk(args.name, args.size, disk=args.disk)
        out.result(resized, f"disk {args.disk} of {args.name} has {format_size(resized.size_bytes)}")
        return
    views = await client.disks(args.name)
    rows = [
        (
            str(view.index),
            format_size(view.size_bytes),
            format_size(view.allocated_bytes),
            view.format,
            str(view.queues),
            view.path,
        )
        for view in views
    ]
    out.table(views, ("DISK", "SIZE", "TAKES", "FORMAT", "QUEUES", "IMAGE"), rows)

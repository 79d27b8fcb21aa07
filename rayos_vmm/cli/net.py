"""A machine's network card: what it is, its cable, what passes through it."""

from __future__ import annotations

import argparse
from urllib.parse import quote

import msgspec

from rayos_vmm.cli import observe
from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.daemon import the_daemon
from rayos_vmm.cli.output import Output


def add_net(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="show|link|announce", required=True)
    show = verbs.add_parser("show", help="the card, its cable, what the guest asked of it")
    link = verbs.add_parser("link", help="plug the cable in, or pull it")
    announce = verbs.add_parser("announce", help="have the guest announce its addresses")
    for sub in (show, link, announce):
        add_name(sub)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    link.add_argument("state", choices=("up", "down"))


async def run_net(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    path = f"/vms/{quote(args.name, safe='')}/net"
    if args.verb == "announce":
        await client.request("POST", f"{path}/announce")
        out.result({"announced": args.name}, f"{args.name} was told to announce itself")
    elif args.verb == "link":
        view = msgspec.json.decode(
            await client.request("PUT", f"{path}/link", body={"up": args.state == "up"})
        )
        out.result(view, f"the link of {args.name} is {'up' if view['is_up'] else 'down'}")
    else:
        view = msgspec.json.decode(await client.request("GET", path))
        out.table(view, ("CARD", "VALUE"), observe.flatten(view))

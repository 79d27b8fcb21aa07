"""Zones: groups of machines that inherit the same rules."""

from __future__ import annotations

import argparse
from typing import Any

from rayos_vmm.cli.completion import add_name, machine_names
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.policy import show_changes
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.contract import asks, operations
from rayos_vmm.errors import Invalid


def _zones(**_arguments: Any) -> list[str]:
    """The zones that a daemon knows; none when none answers."""
    import trio

    from rayos_vmm.cli.completion import DAEMON_TIMEOUT_S
    from rayos_vmm.errors import RayosError

    async def names() -> list[str]:
        with trio.move_on_after(DAEMON_TIMEOUT_S):
            found = (await the_daemon().call(operations.HIERARCHY_ZONES)).zones
            return [entry.zone for entry in found]
        return []

    try:
        return trio.run(names)
    except RayosError:
        return []


def _zone(parser: argparse.ArgumentParser, **options: Any) -> None:
    action = parser.add_argument("zone", metavar="ZONE", **options)
    action.completer = _zones  # type: ignore[attr-defined]  # argcomplete's convention


def add_zone(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="list|create|rm|assign", required=True)
    listing = verbs.add_parser("list", help="the zones, and the machines in each")
    create = verbs.add_parser("create", help="make a zone")
    create.add_argument("zone", metavar="ZONE")
    remove = verbs.add_parser("rm", help="remove a zone that no machine is in")
    _zone(remove)
    assign = verbs.add_parser("assign", help="put a machine into a zone, or under a parent")
    add_name(assign)
    _zone(assign, nargs="?")
    action = assign.add_argument("--parent", metavar="NAME", help="the machine whose rules it inherits")
    action.completer = machine_names  # type: ignore[attr-defined]  # argcomplete's convention
    for sub in (listing, create, remove, assign):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


async def run_zone(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.verb == "list":
        found = (await client.call(operations.HIERARCHY_ZONES)).zones
        rows = [(entry.zone, str(entry.rules), " ".join(entry.vms) or "-") for entry in found]
        out.table(found, ("ZONE", "RULES", "MACHINES"), rows)
        return
    if args.verb == "create":
        answer = await client.call(operations.HIERARCHY_CREATE_ZONE, body=asks.NewZone(zone=args.zone))
    elif args.verb == "rm":
        answer = await client.call(operations.HIERARCHY_REMOVE_ZONE, args.zone)
    else:
        if args.zone is None and args.parent is None:
            raise Invalid("neither a zone nor a parent was named", hint="rayos zone assign NAME ZONE")
        body = asks.Assign(zone=args.zone, parent=args.parent)
        answer = await client.call(operations.HIERARCHY_ASSIGN, args.name, body=body)
    show_changes(out, answer)

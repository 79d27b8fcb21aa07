"""The whole of the machines: how far a policy change has come, the tree that rules are inherited by, the zones."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from rayos_vmm.cli.daemon import the_daemon
from rayos_vmm.cli.observe import flatten
from rayos_vmm.cli.output import Output


def add_scalability(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="status|vms|zones", required=True)
    status = verbs.add_parser("status", help="how the policy's revisions reach the workers")
    vms = verbs.add_parser("vms", help="the machines as a tree, and which revision each has applied")
    zones = verbs.add_parser("zones", help="the zones, their rules, who lags in them")
    for sub in (status, vms, zones):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _applied(entry: dict[str, Any]) -> str:
    if entry["applied"] is None:
        return entry["problem"] or "not running"
    lag = f", {entry['lag']} behind" if entry["lag"] else ""
    return f"{entry['applied']}{lag}{': ' + entry['problem'] if entry['problem'] else ''}"


def _tree(vms: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The machines below their parents, two spaces a level."""
    children: dict[str | None, list[dict[str, Any]]] = {}
    for entry in vms:
        children.setdefault(entry["parent"], []).append(entry)
    rows: list[tuple[str, ...]] = []

    def add(entry: dict[str, Any], depth: int) -> None:
        rules = str(entry["firewall_rules"])
        rows.append(("  " * depth + entry["vm"], entry["zone"] or "-", rules, _applied(entry)))
        for child in children.get(entry["vm"], []):
            add(child, depth + 1)

    for entry in children.get(None, []):
        add(entry, 0)
    return rows


async def run_scalability(args: argparse.Namespace, out: Output) -> None:
    found = msgspec.json.decode(await the_daemon().request("GET", "/scalability"))
    if args.verb == "vms":
        vms = found["vms"]
        out.table(vms, ("MACHINE", "ZONE", "FIREWALL RULES", "REVISION"), _tree(vms))
    elif args.verb == "zones":
        zones = found["zones"]
        rows = [
            (entry["zone"], str(entry["rules"]), str(len(entry["vms"])), " ".join(entry["lagging"]) or "-")
            for entry in zones
        ]
        out.table(zones, ("ZONE", "RULES", "MACHINES", "LAGGING"), rows)
    else:
        status = found["status"]
        out.table(status, ("SCALABILITY", "VALUE"), flatten(status))

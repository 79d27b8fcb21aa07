"""The whole of the machines: how far a policy change has come, the tree of rules, the zones; who serves them where."""

from __future__ import annotations

import argparse

import msgspec

from rayos_vmm.cli.completion import machine_names
from rayos_vmm.cli.output import Output, flatten
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.contract import asks, operations
from rayos_vmm.policy.view import LaggingVm
from rayos_vmm.service.balance import LoadView, Moved, Rebalanced


def add_scalability(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(
        dest="verb", metavar="status|vms|zones|load|rebalance|move|auto", required=True
    )
    status = verbs.add_parser(
        "status", help="how the policy's revisions reach the workers; how even their load is"
    )
    vms = verbs.add_parser("vms", help="the machines as a tree, and which revision each has applied")
    zones = verbs.add_parser("zones", help="the zones, their rules, who lags in them")
    load = verbs.add_parser("load", help="how busy each device worker is, and each processor with them")
    rebalance = verbs.add_parser("rebalance", help="move workers to idler processors, where it is worth it")
    move = verbs.add_parser("move", help="hand a machine's devices over to a new worker on another processor")
    action = move.add_argument("name", metavar="NAME", help="the machine")
    action.completer = machine_names  # type: ignore[attr-defined]  # argcomplete's convention
    move.add_argument("core", metavar="CORE", type=int, help="the processor, from 0")
    auto = verbs.add_parser(
        "auto", help="move workers without being asked while their load is uneven, or not"
    )
    auto.add_argument("switch", metavar="on|off", choices=("on", "off"))
    for sub in (status, vms, zones, load, rebalance, move, auto):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _applied(entry: LaggingVm) -> str:
    if entry.applied is None:
        return entry.problem or "not running"
    lag = f", {entry.lag} behind" if entry.lag else ""
    return f"{entry.applied}{lag}{': ' + entry.problem if entry.problem else ''}"


def _tree(vms: list[LaggingVm]) -> list[tuple[str, ...]]:
    """The machines below their parents, two spaces a level."""
    children: dict[str | None, list[LaggingVm]] = {}
    for entry in vms:
        children.setdefault(entry.parent, []).append(entry)
    rows: list[tuple[str, ...]] = []

    def add(entry: LaggingVm, depth: int) -> None:
        rules = str(entry.firewall_rules)
        rows.append(("  " * depth + entry.vm, entry.zone or "-", rules, _applied(entry)))
        for child in children.get(entry.vm, []):
            add(child, depth + 1)

    for entry in children.get(None, []):
        add(entry, 0)
    return rows


async def _run_load(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.verb == "move":
        moved = await client.call(operations.SCALABILITY_MOVE, args.name, body=asks.Place(core=args.core))
        out.result(moved, _moved(moved))
        return
    if args.verb == "auto":
        switch = asks.Switch(on=args.switch == "on")
        status = await client.call(operations.SCALABILITY_SWITCH, body=switch)
        out.result(status, f"workers are{'' if switch.on else ' not'} moved without being asked")
        return
    found: LoadView
    if args.verb == "load":
        found = await client.call(operations.SCALABILITY_LOAD)
    else:
        found = await client.call(operations.SCALABILITY_REBALANCE)
    workers = [(entry.vm, str(entry.pid), str(entry.core), f"{entry.share:.1%}") for entry in found.workers]
    out.table(found, ("MACHINE", "WORKER", "CORE", "BUSY"), workers)
    for entry in found.cores:
        out.note(f"core {entry.core}: {entry.share:.1%} busy with {entry.workers} workers")
    automatic = "on" if found.automatic.on else "off"
    out.note(
        f"imbalance {found.imbalance:.1%}, variance {found.variance:.4f}, {found.moves} moves so far; "
        f"automatic: {automatic}, {found.automatic.moves} of them"
    )
    for made in found.made if isinstance(found, Rebalanced) else []:
        out.note(_moved(made))


def _moved(made: Moved) -> str:
    return f"{made.vm} is served on core {made.core}, after a pause of {made.pause_ms:.1f} ms"


async def run_scalability(args: argparse.Namespace, out: Output) -> None:
    if args.verb in ("load", "rebalance", "move", "auto"):
        await _run_load(args, out)
        return
    found = await the_daemon().call(operations.SCALABILITY_STATUS)
    if args.verb == "vms":
        vms = found.vms
        out.table(vms, ("MACHINE", "ZONE", "FIREWALL RULES", "REVISION"), _tree(vms))
    elif args.verb == "zones":
        zones = found.zones
        rows = [
            (entry.zone, str(entry.rules), str(len(entry.vms)), " ".join(entry.lagging) or "-")
            for entry in zones
        ]
        out.table(zones, ("ZONE", "RULES", "MACHINES", "LAGGING"), rows)
    else:
        status = {**msgspec.to_builtins(found.status), "balance": msgspec.to_builtins(found.balance)}
        out.table(status, ("SCALABILITY", "VALUE"), flatten(status))

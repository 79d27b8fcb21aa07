"""Faults of a machine's devices on purpose: errors, losses, delays."""

from __future__ import annotations

import argparse

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.fault import EXAMPLE, parse_fault
from rayos_vmm.contract import asks, operations
from rayos_vmm.shared.view import FaultState


def add_fault(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="set|clear|list", required=True)
    put = verbs.add_parser("set", help="have things go wrong in a device, in place of its former faults")
    clear = verbs.add_parser("clear", help="have nothing go wrong any more")
    listing = verbs.add_parser("list", help="the faults, and how often each struck")
    for sub in (put, clear, listing):
        add_name(sub)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    for sub in (put, clear):
        sub.add_argument("device", metavar="DEVICE", help="disk0, net, …")
    put.add_argument("rules", nargs="+", metavar="RULE", help=f"OP:ACTION,KEY=VALUE,… such as {EXAMPLE}")
    put.add_argument("--seed", type=int, default=0, help="of the probabilities (default: 0)")


def _rows(found: dict[str, list[FaultState]]) -> list[tuple[str, ...]]:
    return [
        (
            device,
            f"{rule.op}:{rule.action}",
            ",".join(f"{key}={value}" for key, value in rule.conditions.items()) or "always",
            str(rule.matched),
            str(rule.done),
        )
        for device, rules in found.items()
        for rule in rules
    ]


async def run_fault(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.verb == "list":
        found = await client.call(operations.FAULTS_GET, args.name)
    else:
        rules = [parse_fault(rule) for rule in args.rules] if args.verb == "set" else []
        body = asks.SetFaults(device=args.device, rules=rules, seed=getattr(args, "seed", 0))
        found = await client.call(operations.FAULTS_SET, args.name, body=body)
    out.table(found, ("DEVICE", "FAULT", "WHEN", "MATCHED", "DONE"), _rows(found))

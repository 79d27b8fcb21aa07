"""Who may do what, at a glance: counts beside their limits, grants, delegations, constraints, the last decisions."""

from __future__ import annotations

import argparse

import msgspec

from rayos_vmm.cli import audit, grant
from rayos_vmm.cli.output import Output, flatten
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.contract import operations
from rayos_vmm.policy.view import GrantView


def add_security(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(
        dest="verb", metavar="status|grants|delegations|constraints|audit", required=True
    )
    status = verbs.add_parser("status", help="how much there is of everything, and how much there may be")
    grants = verbs.add_parser("grants", help="what operators granted")
    delegations = verbs.add_parser("delegations", help="what machines passed on")
    constraints = verbs.add_parser("constraints", help="what is granted or passed on under constraints")
    records = verbs.add_parser("audit", help="the last decisions")
    records.add_argument("-n", "--limit", type=int, default=20, help="how many, at most 1024 (default: 20)")
    for sub in (status, grants, delegations, constraints, records):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _is_shown(verb: str, entry: GrantView) -> bool:
    if verb == "constraints":
        return bool(entry.constraints.count)
    return bool(entry.kind == {"grants": "grant", "delegations": "delegation"}[verb])


async def run_security(args: argparse.Namespace, out: Output) -> None:
    if args.verb == "audit":
        await audit.run_audit(argparse.Namespace(verb="list", limit=args.limit), out)
    elif args.verb == "status":
        status = await the_daemon().call(operations.POLICY_SECURITY)
        out.table(status, ("SECURITY", "VALUE"), flatten(msgspec.to_builtins(status)))
    else:
        found = (await the_daemon().call(operations.POLICY_GRANTS)).grants
        grant.show(out, [entry for entry in found if _is_shown(args.verb, entry)])

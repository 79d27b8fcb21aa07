"""The record of every decision: list, verify, export."""

from __future__ import annotations

import argparse
import time
from typing import Any

import msgspec

from rayos_vmm.cli.daemon import the_daemon
from rayos_vmm.cli.output import Output
from rayos_vmm.errors import RayosError


class AuditDamaged(RayosError):
    """The audit file is not what was written."""

    code = "audit_damaged"


def add_audit(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="list|verify|export", required=True)
    listing = verbs.add_parser("list", help="the last records")
    listing.add_argument("-n", "--limit", type=int, default=100, help="how many, at most 1024 (default: 100)")
    verify = verbs.add_parser("verify", help="check the whole chain; names the first bad record")
    export = verbs.add_parser("export", help="the file as it is: a digest and the record's JSON a line")
    for sub in (listing, verify, export):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
    data = " ".join(
        f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in entry["data"].items()
        if value is not None
    )
    decision = "allow" if entry["allowed"] else "deny"
    return (str(entry["seq"]), clock, entry["op"], entry["vm"] or "-", decision, data or "-")


async def run_audit(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.verb == "list":
        found = msgspec.json.decode(await client.request("GET", "/audit", query={"limit": args.limit}))
        header = ("SEQ", "TIME", "OPERATION", "MACHINE", "DECISION", "DETAILS")
        out.table(found, header, [_row(entry) for entry in found["records"]])
        if found["lost"]:
            out.note(f"{found['lost']} records could not be written")
    elif args.verb == "verify":
        result = msgspec.json.decode(await client.request("GET", "/audit/verify"))
        if not result["ok"]:
            raise AuditDamaged(f"the audit file is damaged: {result['problem']}")
        out.result(result, f"{result['records']} records, unbroken; {result['lost']} lost")
    else:
        out.write(await client.request("GET", "/audit/export"))

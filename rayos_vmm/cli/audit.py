"""The record of every decision: list, verify, export."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.contract import asks, operations
from rayos_vmm.errors import Invalid, RayosError
from rayos_vmm.policy.audit import Entry
from rayos_vmm.policy.view import Verified


class AuditDamaged(RayosError):
    """The audit file is not what was written."""

    code = "audit_damaged"


def add_audit(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="list|verify|key|export|restart", required=True)
    listing = verbs.add_parser("list", help="the last records")
    listing.add_argument("-n", "--limit", type=int, default=100, help="how many, at most 1024 (default: 100)")
    verify = verbs.add_parser("verify", help="check the whole chain; names the first bad record")
    verify.add_argument(
        "--key", type=Path, metavar="FILE", help="check the signatures by this public key, here"
    )
    verify.add_argument(
        "--file", type=Path, metavar="FILE", help="what `export` wrote, instead of the daemon's"
    )
    verify.add_argument(
        "--witness",
        metavar="FILE|URL",
        help="also hold it against the heads that a witness kept ([audit] witness), here",
    )
    key = verbs.add_parser("key", help="the public key that the record is signed by; keep it elsewhere")
    export = verbs.add_parser("export", help="the file as it is: a digest and the record's JSON a line")
    restart = verbs.add_parser("restart", help="set a damaged record aside, as evidence, and begin another")
    restart.add_argument("--reason", required=True, help="recorded first of all")
    for sub in (listing, verify, key, export, restart):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _row(entry: Entry) -> tuple[str, ...]:
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
    data = " ".join(
        f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in entry.data.items()
        if value is not None
    )
    decision = "allow" if entry.allowed else "deny"
    return (str(entry.seq), clock, entry.op.value, entry.vm or "-", decision, data or "-")


def _said(result: Verified) -> str:
    since = f" from record {result.first} on" if result.first and result.first > 1 else ""
    return f"{result.records} records, unbroken{since}, signed up to {result.signed}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Invalid(f"{path}: cannot be read: {error.strerror}", code="file_missing") from None


def _verify_here(data: bytes, key: bytes | None, place: str | None, out: Output) -> None:
    """Checks the record without the daemon's word, and against what the witness at `place` kept."""
    from rayos_vmm.policy.audit import Damage, is_signed, verify
    from rayos_vmm.policy.audit_key import read_public
    from rayos_vmm.policy.audit_witness import AuditWitness

    public = read_public(key) if key is not None else None
    heads = AuditWitness(place).read() if place is not None else []
    if place is not None and not heads:
        raise AuditDamaged(f"the witness {place} has kept no head")
    for head in heads:
        if public is not None and not is_signed(public, head.anchor, head.signature):
            raise AuditDamaged(
                f"the witness {place}: the head of record {head.seq} is not signed by this key"
            )
    try:
        found = verify(data.splitlines(keepends=True), [head.anchor for head in heads], public)
    except Damage as damage:
        raise AuditDamaged(f"the audit record is damaged: {damage}") from None
    held = sum(head.seq >= found.first for head in heads)
    result = Verified(
        ok=True,
        records=found.anchor.seq,
        first=found.first,
        digest=found.anchor.digest,
        signed=found.signed,
        heads=held,
    )
    against = f"; it holds {held} heads that the witness kept" if place is not None else ""
    out.result(result, f"{_said(result)}{against}")


async def run_audit(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.verb == "list":
        found = await client.call(operations.POLICY_AUDIT, query=asks.AuditQuery(limit=args.limit))
        header = ("SEQ", "TIME", "OPERATION", "MACHINE", "DECISION", "DETAILS")
        out.table(found, header, [_row(entry) for entry in found.records])
        if found.lost:
            out.note(f"{found.lost} records could not be written")
    elif args.verb == "restart":
        aside = await client.call(operations.POLICY_RESTART, body=asks.Why(reason=args.reason))
        out.result(aside, f"the damaged record is in {aside.folder}, and another has begun")
    elif args.verb == "key":
        key = await client.call(operations.POLICY_KEY)
        out.result(key, key.public.rstrip())
    elif args.verb == "verify" and (args.key, args.file, args.witness) != (None, None, None):
        data = _read(args.file) if args.file is not None else await client.call(operations.POLICY_EXPORT)
        _verify_here(data, _read(args.key) if args.key is not None else None, args.witness, out)
    elif args.verb == "verify":
        result = await client.call(operations.POLICY_VERIFY)
        if not result.ok:
            raise AuditDamaged(f"the audit file is damaged: {result.problem}")
        out.result(result, f"{_said(result)}; {result.lost} lost")
    else:
        out.write(await client.call(operations.POLICY_EXPORT))

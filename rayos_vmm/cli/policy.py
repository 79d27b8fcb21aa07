"""The policy document: show, apply, compare, go back; and what holds for one machine, and why."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output, render_table
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.load import Table
from rayos_vmm.contract import asks, operations
from rayos_vmm.errors import Invalid
from rayos_vmm.policy.revisions import Revision
from rayos_vmm.policy.view import Changes, PolicyView, RightView

_SIGNS = {"added": "+", "removed": "-", "changed": "~"}


def add_policy(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(
        dest="verb", metavar="show|apply|diff|history|rollback|explain", required=True
    )
    show = verbs.add_parser("show", help="the document in force, as `apply` takes it")
    apply = verbs.add_parser("apply", help="put a document in force, whole or not at all")
    diff = verbs.add_parser("diff", help="what applying a document would change")
    for sub in (apply, diff):
        sub.add_argument("file", metavar="FILE", help="TOML or JSON; - is standard input")
    apply.add_argument("--reason", default="", help="why, for the record")
    apply.add_argument("--base", type=int, metavar="REV", help="refuse unless this revision is in force")
    history = verbs.add_parser("history", help="the revisions that are kept")
    rollback = verbs.add_parser("rollback", help="put the document of a former revision in force again")
    rollback.add_argument("revision", type=int, metavar="REV", help="0 is the empty document")
    explain = verbs.add_parser("explain", help="what holds for a machine, and where each of it comes from")
    add_name(explain)
    for sub in (show, apply, diff, history, rollback, explain):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _read(name: str) -> Table:
    from rayos_vmm.policy.document import load

    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return load(data.decode())
    except OSError as error:
        raise Invalid(f"{name}: cannot be read: {error.strerror}", code="file_missing") from None
    except UnicodeDecodeError:
        raise Invalid(f"{name}: is not UTF-8 text") from None
    except Invalid as error:
        raise Invalid(f"{name}: {error.message}") from None


def show_changes(out: Output, answer: Changes) -> None:
    """Prints the changes, a path a line."""
    lines = [f"{_SIGNS[change.what]} {change.path}" for change in answer.changes] or ["no change"]
    if answer.revision is not None:
        lines.append(f"revision {answer.revision} is in force")
    if answer.lagging:
        lines.append(f"not yet applied by {', '.join(answer.lagging)}: see rayos scalability vms")
    out.result(answer, "\n".join(lines))


def _row(entry: Revision) -> tuple[str, ...]:
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
    return (str(entry.number), clock, str(entry.changes), entry.reason or "-")


def _source(right: RightView) -> str:
    if right.denied_by:
        return f"denied by {right.denied_by}"
    ways = [" -> ".join(f"{link.vm}#{link.id}" for link in way) for way in right.from_]
    return ", ".join(ways) or "never granted"


def _explained(found: PolicyView) -> str:
    rights = [
        (right.capability, "allow" if right.allowed else "deny", _source(right)) for right in found.rights
    ]
    limits = [(name, str(entry.limit), entry.from_) for name, entry in found.limits.items()]
    rules = [(str(rule.priority), rule.action, rule.name, rule.from_) for rule in found.firewall]
    parts = [
        f"revision {found.revision}; inherits from {', '.join(found.levels)}",
        render_table(("CAPABILITY", "DECISION", "BY"), rights),
    ]
    if limits:
        parts.append(render_table(("LIMIT", "AT MOST", "BY"), limits))
    if rules:
        parts.append(render_table(("PRIORITY", "ACTION", "FIREWALL RULE", "OF"), rules))
    return "\n\n".join(parts)


async def run_policy(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.verb == "show":
        shown = await client.call(operations.HIERARCHY_SHOW)
        out.result(shown, msgspec.json.format(msgspec.json.encode(shown.document)).decode())
    elif args.verb == "apply":
        body = asks.Apply(document=_read(args.file), reason=args.reason, base=args.base)
        show_changes(out, await client.call(operations.HIERARCHY_APPLY, body=body))
    elif args.verb == "diff":
        compared = asks.Compare(document=_read(args.file))
        show_changes(out, await client.call(operations.HIERARCHY_DIFF, body=compared))
    elif args.verb == "history":
        kept = (await client.call(operations.HIERARCHY_HISTORY)).revisions
        out.table(kept, ("REVISION", "TIME", "CHANGES", "REASON"), [_row(entry) for entry in kept])
    elif args.verb == "rollback":
        back = asks.Rollback(revision=args.revision)
        show_changes(out, await client.call(operations.HIERARCHY_ROLLBACK, body=back))
    else:
        found = await client.call(operations.POLICY_EXPLAIN, args.name)
        out.result(found, _explained(found))

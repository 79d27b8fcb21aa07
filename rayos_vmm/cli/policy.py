"""The policy document: show, apply, compare, go back; and what holds for one machine, and why."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output, render_table
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.errors import Invalid

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


def _read(name: str) -> dict[str, Any]:
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


def show_changes(out: Output, answer: dict[str, Any]) -> None:
    """Prints the changes, a path a line."""
    lines = [f"{_SIGNS[change['what']]} {change['path']}" for change in answer["changes"]] or ["no change"]
    if answer["revision"] is not None:
        lines.append(f"revision {answer['revision']} is in force")
    if answer["lagging"]:
        lines.append(f"not yet applied by {', '.join(answer['lagging'])}: see rayos scalability vms")
    out.result(answer, "\n".join(lines))


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
    return (str(entry["number"]), clock, str(entry["changes"]), entry["reason"] or "-")


def _source(right: dict[str, Any]) -> str:
    if right["denied_by"]:
        return f"denied by {right['denied_by']}"
    ways = [" -> ".join(f"{link['vm']}#{link['id']}" for link in way) for way in right["from"]]
    return ", ".join(ways) or "never granted"


def _explained(found: dict[str, Any]) -> str:
    rights = [
        (right["capability"], "allow" if right["allowed"] else "deny", _source(right))
        for right in found["rights"]
    ]
    limits = [(name, str(entry["limit"]), entry["from"]) for name, entry in found["limits"].items()]
    rules = [
        (str(rule["priority"]), rule["action"], rule["name"], rule["from"]) for rule in found["firewall"]
    ]
    parts = [
        f"revision {found['revision']}; inherits from {', '.join(found['levels'])}",
        render_table(("CAPABILITY", "DECISION", "BY"), rights),
    ]
    if limits:
        parts.append(render_table(("LIMIT", "AT MOST", "BY"), limits))
    if rules:
        parts.append(render_table(("PRIORITY", "ACTION", "FIREWALL RULE", "OF"), rules))
    return "\n\n".join(parts)


async def run_policy(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    decode = msgspec.json.decode
    if args.verb == "show":
        found = decode(await client.request("GET", "/policy"))
        out.result(found, msgspec.json.format(msgspec.json.encode(found["document"])).decode())
    elif args.verb == "apply":
        body = {"document": _read(args.file), "reason": args.reason, "base": args.base}
        show_changes(out, decode(await client.request("PUT", "/policy", body=body)))
    elif args.verb == "diff":
        show_changes(
            out, decode(await client.request("POST", "/policy/diff", body={"document": _read(args.file)}))
        )
    elif args.verb == "history":
        found = decode(await client.request("GET", "/policy/history"))["revisions"]
        out.table(found, ("REVISION", "TIME", "CHANGES", "REASON"), [_row(entry) for entry in found])
    elif args.verb == "rollback":
        body = {"revision": args.revision}
        show_changes(out, decode(await client.request("POST", "/policy/rollback", body=body)))
    else:
        found = decode(await client.request("GET", f"/vms/{quote(args.name, safe='')}/policy"))
        out.result(found, _explained(found))

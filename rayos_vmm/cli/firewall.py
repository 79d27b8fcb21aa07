"""A machine's firewall: its rules, live; what would happen to a packet; what happens to each."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output, flatten
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.firewall import FirewallConfig, FirewallRule
from rayos_vmm.config.load import explain
from rayos_vmm.contract import asks, operations
from rayos_vmm.contract.answers import Applied, CountedRule
from rayos_vmm.errors import Invalid
from rayos_vmm.shared.view import Verdict

_HEADER: Final = ("PRIORITY", "NAME", "ACTION", "DIRECTION", "PROTOCOL", "FROM", "TO", "ORIGIN", "HITS")
_FLAGS: Final = ("log", "audit_only")


def add_firewall(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(
        dest="verb", metavar="list|add|remove|set|explain|trace|stats", required=True
    )
    summaries = {
        "list": "all rules that hold, in the order in which they are looked at",
        "add": "add a rule; a running guest obeys it when this returns",
        "remove": "remove rules of the machine's own",
        "set": "replace the machine's own rules by those of a TOML file, at once",
        "explain": "what would happen to a packet, and which rule decides",
        "trace": "what happens to each packet from now on",
        "stats": "how many frames each layer and each reason decided, and each layer's share",
    }
    found = {verb: verbs.add_parser(verb, help=summary) for verb, summary in summaries.items()}
    for sub in found.values():
        add_name(sub)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    _add_rule(found["add"])
    found["remove"].add_argument("rules", metavar="RULE", nargs="+")
    found["set"].add_argument("file", metavar="FILE", type=Path, help="with [[rules]] tables")
    found["explain"].add_argument(
        "packet",
        metavar="PACKET",
        nargs="+",
        help="such as: out tcp 10.86.0.2:4000 to 93.184.216.34:80 (`in`: to the guest)",
    )


def _add_rule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rule", metavar="RULE", help="its name")
    parser.add_argument("action", choices=("allow", "deny", "reject"))
    parser.add_argument("--direction", choices=("in", "out"), help="seen from the guest (default: both)")
    parser.add_argument("--protocol", help="tcp, udp, icmp, icmpv6, … or a number")
    for side in ("from", "to"):
        parser.add_argument(
            f"--{side}",
            action="append",
            dest=f"{side}_",
            metavar="ADDRESS",
            help="or a CIDR, vm:NAME, zone:NAME",
        )
    parser.add_argument("--from-ports", action="append", metavar="PORTS", help="such as 80 or 8000-8100")
    parser.add_argument("--ports", action="append", metavar="PORTS", help="of the destination")
    parser.add_argument("--priority", type=int, help="0 to 65535, lowest first (default: 100)")
    parser.add_argument("--log", action="store_true", help="tell of each new flow that it decides")
    parser.add_argument("--audit-only", action="store_true", help="tell of what it would decide, no more")


def _rule(args: argparse.Namespace) -> FirewallRule:
    fields = ("action", "direction", "protocol", "from_ports", "ports", "priority", *_FLAGS)
    table = {
        "name": args.rule,
        "from": args.from_,
        "to": args.to_,
        **{key: getattr(args, key) for key in fields},
    }
    given = {key: value for key, value in table.items() if value is not None and value is not False}
    try:
        return msgspec.convert(given, FirewallRule)
    except msgspec.ValidationError as error:
        raise Invalid(explain(error, data=given)) from None


def read_rules(path: Path) -> list[FirewallRule]:
    """The `[[rules]]` of a TOML file. Raises Invalid, with the file and the key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(table, FirewallConfig).rules
    except OSError as error:
        raise Invalid(f"{path}: cannot be read: {error.strerror}", code="file_missing") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"{path}: not TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise Invalid(f"{path}: {explain(error, data=table)}") from None


def _side(value: Any, ports: Any) -> str:
    words = [value] if isinstance(value, str) else value or ["any"]
    numbers = [ports] if isinstance(ports, str | int) else ports or []
    return ",".join(words) + (f" port {','.join(map(str, numbers))}" if numbers else "")


def _row(one: CountedRule) -> tuple[str, ...]:
    rule = one.rule
    marks = "".join(f" ({flag.replace('_', ' ')})" for flag in _FLAGS if getattr(rule, flag))
    return (
        str(rule.priority),
        rule.name,
        rule.action + marks,
        rule.direction or "both",
        str(rule.protocol or "any"),
        _side(rule.from_, rule.from_ports),
        _side(rule.to, rule.ports),
        one.origin,
        "-" if one.hits is None else str(one.hits),
    )


async def run_firewall(args: argparse.Namespace, out: Output) -> None:
    client, name = the_daemon(), args.name
    match args.verb:
        case "list":
            rules = (await client.call(operations.FIREWALL_RULES, name)).rules
            rules.sort(key=lambda one: one.rule.priority)
            out.table(rules, _HEADER, [_row(one) for one in rules])
        case "add":
            _applied(await client.call(operations.FIREWALL_ADD, name, body=_rule(args)), out)
        case "remove":
            for rule in args.rules:
                applied = await client.call(operations.FIREWALL_REMOVE, name, rule)
            _applied(applied, out)
        case "set":
            body = asks.AskRules(rules=read_rules(args.file))
            _applied(await client.call(operations.FIREWALL_SET, name, body=body), out)
        case "explain":
            packet = asks.AskPacket(packet=" ".join(args.packet))
            told = await client.call(operations.FIREWALL_EXPLAIN, name, body=packet)
            out.result(told, say(told))
        case "trace":
            async with client.firewall_trace(name) as verdicts:
                async for told in verdicts:
                    out.line(told, f"{told.direction:3} {told.packet}  {say(told)}")
        case _:
            stats = (await client.stats(name)).get("net", {}).get("firewall")
            if stats is None:
                raise Invalid(f"{name} has no network card with a firewall")
            out.table(stats, ("FIREWALL", "VALUE"), flatten(stats))


def _applied(applied: Applied, out: Output) -> None:
    out.result(applied, f"in force as revision {applied.revision}")


def say(told: Verdict) -> str:
    """A verdict in words: what, why, by which rule, from where."""
    rule = f" {told.rule}" if told.rule else ""
    origin = f" of {told.origin}" if told.origin else ""
    audit = f"; audit-only rule {told.audit_rule} would come first" if told.audit_rule else ""
    layer = f" [{told.layer}]" if told.layer else ""
    return f"{told.action}: {told.reason}{rule}{origin}{layer}{audit}"

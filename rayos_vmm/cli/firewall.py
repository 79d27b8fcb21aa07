"""A machine's firewall: its rules, live; what would happen to a packet; what happens to each."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output, flatten
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.firewall import FirewallConfig, FirewallRule
from rayos_vmm.config.load import explain
from rayos_vmm.errors import Invalid

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


def _rule(args: argparse.Namespace) -> dict[str, Any]:
    fields = ("action", "direction", "protocol", "from_ports", "ports", "priority", *_FLAGS)
    table = {
        "name": args.rule,
        "from": args.from_,
        "to": args.to_,
        **{key: getattr(args, key) for key in fields},
    }
    return {key: value for key, value in table.items() if value is not None and value is not False}


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


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    rule = one["rule"]
    marks = "".join(f" ({flag.replace('_', ' ')})" for flag in _FLAGS if rule.get(flag))
    return (
        str(rule.get("priority", 100)),
        rule["name"],
        rule["action"] + marks,
        rule.get("direction") or "both",
        str(rule.get("protocol") or "any"),
        _side(rule.get("from"), rule.get("from_ports")),
        _side(rule.get("to"), rule.get("ports")),
        one["origin"],
        "-" if one["hits"] is None else str(one["hits"]),
    )


async def run_firewall(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    path = f"/vms/{quote(args.name, safe='')}/firewall"
    match args.verb:
        case "list":
            rules = msgspec.json.decode(await client.request("GET", path))["rules"]
            rules.sort(key=lambda one: one["rule"].get("priority", 100))
            out.table(rules, _HEADER, [_row(one) for one in rules])
        case "add":
            answer = await client.request("POST", f"{path}/rules", body=_rule(args))
            _applied(answer, out)
        case "remove":
            for name in args.rules:
                answer = await client.request("DELETE", f"{path}/rules/{quote(name, safe='')}")
            _applied(answer, out)
        case "set":
            answer = await client.request("PUT", path, body={"rules": read_rules(args.file)})
            _applied(answer, out)
        case "explain":
            body = {"packet": " ".join(args.packet)}
            told = msgspec.json.decode(await client.request("POST", f"{path}/explain", body=body))
            out.result(told, say(told))
        case "trace":
            async with client.firewall_trace(args.name) as verdicts:
                async for told in verdicts:
                    out.line(told, f"{told['direction']:3} {told['packet']}  {say(told)}")
        case _:
            stats = (await client.stats(args.name)).get("net", {}).get("firewall")
            if stats is None:
                raise Invalid(f"{args.name} has no network card with a firewall")
            out.table(stats, ("FIREWALL", "VALUE"), flatten(stats))


def _applied(answer: bytes, out: Output) -> None:
    applied = msgspec.json.decode(answer)
    out.result(applied, f"in force as revision {applied['revision']}")


def say(told: dict[str, Any]) -> str:
    """A verdict in words: what, why, by which rule, from where."""
    rule = f" {told['rule']}" if told["rule"] else ""
    origin = f" of {told['origin']}" if told["origin"] else ""
    audit = f"; audit-only rule {told['audit_rule']} would come first" if told["audit_rule"] else ""
    layer = f" [{told['layer']}]" if told["layer"] else ""
    return f"{told['action']}: {told['reason']}{rule}{origin}{layer}{audit}"

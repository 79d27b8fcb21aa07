"""Tokens: give out, narrow without asking the daemon, look into, end."""

from __future__ import annotations

import argparse
import sys
import time

from rayos_vmm.cli.arguments import duration
from rayos_vmm.cli.completion import machine_names
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.contract import asks, operations
from rayos_vmm.errors import Invalid
from rayos_vmm.policy.gatekeeper import Issued


def _add_caveats(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument("--vm", action="append", metavar="NAME,…", help="for these machines alone")
    action.completer = machine_names  # type: ignore[attr-defined]  # argcomplete's convention
    parser.add_argument("--zone", action="append", metavar="NAME,…", help="for machines of these zones alone")
    parser.add_argument("--cap", action="append", metavar="CAP,…", help="for what needs these rights")
    parser.add_argument(
        "--command", dest="commands", action="append", metavar="NAME,…", help="such as console,policy.grant"
    )
    parser.add_argument("--uid", type=int, help="for this user alone")
    parser.add_argument("--ttl", type=duration, help="for so long, such as 1h")


def _caveats(args: argparse.Namespace) -> list[str]:
    found = [
        f"{key}={value}"
        for key, values in (("vm", args.vm), ("zone", args.zone), ("command", args.commands))
        for value in values or []
    ]
    for words in args.cap or []:
        names = [word.upper() for word in words.split(",")]
        full = [name if name.startswith("CAP_") else f"CAP_{name}" for name in names]
        found.append(f"capability={','.join(full)}")
    return found + ([f"uid={args.uid}"] if args.uid is not None else [])


def add_token(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="create|attenuate|inspect|list|revoke", required=True)
    create = verbs.add_parser("create", help="give out a token; without options it may do all that you may")
    create.add_argument("--label", default="", help="what it is for")
    attenuate = verbs.add_parser("attenuate", help="a token that may less, made without the daemon")
    inspect = verbs.add_parser("inspect", help="what is in a token; whether it is genuine the daemon knows")
    for sub in (attenuate, inspect):
        sub.add_argument("text", metavar="TOKEN", help="- reads it from standard input")
    for sub in (create, attenuate):
        _add_caveats(sub)
    listing = verbs.add_parser("list", help="the tokens that hold")
    revoke = verbs.add_parser("revoke", help="end a token, and all that were narrowed from it")
    revoke.add_argument("id", metavar="ID", help="as `list` and `inspect` show it")
    for sub in (create, attenuate, inspect, listing, revoke):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _offline(args: argparse.Namespace, out: Output) -> None:
    from rayos_vmm.policy.token import BadToken, parse

    try:
        token = parse(sys.stdin.readline() if args.text == "-" else args.text)
        if args.verb == "attenuate":
            ends = [f"expires={time.time() + args.ttl:.3f}"] if args.ttl is not None else []
            caveats = _caveats(args) + ends
            if not caveats:
                raise Invalid("nothing to narrow it by was named", hint="rayos token attenuate --help")
            text = token.narrowed(caveats).text()
            out.result({"token": text}, text)
            return
    except BadToken as error:
        raise Invalid(f"not a token: {error}" if args.verb == "inspect" else str(error)) from None
    value = {"identifier": token.identifier, "caveats": list(token.caveats)}
    out.result(value, "\n".join([f"token {token.identifier}", *(f"  {caveat}" for caveat in token.caveats)]))


def _row(issued: Issued) -> tuple[str, ...]:
    end = issued.end
    until = "-" if end is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end.wall))
    caveats = " ".join(caveat for caveat in issued.caveats if not caveat.startswith("expires="))
    return (issued.identifier, issued.label or "-", str(issued.by), until, caveats or "-")


async def run_token(args: argparse.Namespace, out: Output) -> None:
    if args.verb in ("attenuate", "inspect"):
        _offline(args, out)
        return
    client = the_daemon()
    if args.verb == "create":
        ask = asks.AskToken(caveats=_caveats(args), label=args.label, ttl_s=args.ttl)
        found = await client.call(operations.TOKEN_CREATE, body=ask)
        out.result(found, found.token)
    elif args.verb == "list":
        issued = (await client.call(operations.TOKEN_LIST)).tokens
        out.table(issued, ("ID", "LABEL", "BY UID", "UNTIL", "FOR"), [_row(entry) for entry in issued])
    else:
        gone = await client.call(operations.TOKEN_REVOKE, args.id)
        out.result(gone, f"token {gone.identifier} is no good any more")

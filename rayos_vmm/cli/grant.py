"""Rights of machines: grant, revoke, delegate, and what there is."""

from __future__ import annotations

import argparse
from typing import Any, Final

from rayos_vmm.cli.arguments import duration
from rayos_vmm.cli.completion import add_name, machine_names
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.spec import CAPABILITIES
from rayos_vmm.config.units import format_rate
from rayos_vmm.contract import asks, operations
from rayos_vmm.errors import Invalid
from rayos_vmm.policy.view import GrantView

_HEADER: Final = ("ID", "MACHINE", "CAPABILITIES", "KIND", "LEFT", "FROM", "CONSTRAINTS", "REASON")


def _words(parser: argparse.ArgumentParser, **options: Any) -> None:
    action = parser.add_argument(
        "capabilities", metavar="CAP", help=f"{', '.join(CAPABILITIES)}, or all", **options
    )
    action.completer = lambda **_: [*CAPABILITIES, "all"]  # type: ignore[attr-defined]  # argcomplete's convention


def _left(grant: GrantView) -> str:
    return "-" if grant.left_s is None else f"{grant.left_s:.1f} s"


def constraint_words(grant: GrantView) -> list[str]:
    """A grant's constraints, as they are given to `rayos grant`."""
    given = grant.constraints
    words = []
    if ports := given.ports:
        words.append(f"ports={','.join(str(a) if a == b else f'{a}-{b}' for a, b in ports)}")
    if (rate := given.bandwidth) is not None:
        words.append(f"bandwidth={format_rate(rate)}")
    if (count := given.concurrent) is not None:
        words.append(f"concurrent={count}")
    return words + (["audit"] if given.audit else [])


def _add_constraints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ports", metavar="PORT,…", help="TCP and UDP ports alone, such as 80,8000-8100")
    parser.add_argument("--bandwidth", metavar="RATE", help="of network card and disks, such as 10Mbit/s")
    parser.add_argument("--concurrent", metavar="N", type=int, help="requests that a disk works on at once")
    parser.add_argument("--audit", action="store_true", help="record each second of use")


def _constraints(args: argparse.Namespace) -> asks.AskConstraints:
    ports = args.ports.split(",") if args.ports else []
    return asks.AskConstraints(
        ports=ports, bandwidth=args.bandwidth, concurrent=args.concurrent, audit=args.audit
    )


def _row(grant: GrantView) -> tuple[str, ...]:
    return (
        str(grant.id),
        grant.vm,
        " ".join(grant.capabilities) or "none",
        grant.kind,
        _left(grant),
        str(grant.parent or "-"),
        " ".join(constraint_words(grant)) or "-",
        grant.reason or "-",
    )


def show(out: Output, grants: list[GrantView]) -> None:
    """Grants as a table."""
    out.table(grants, _HEADER, [_row(grant) for grant in grants])


def add_grant(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    _words(parser, nargs="+")
    parser.add_argument("--ttl", type=duration, help="for so long, such as 30s (default: until revoked)")
    parser.add_argument("--reason", default="", help="why, for the record")
    _add_constraints(parser)


async def run_grant(args: argparse.Namespace, out: Output) -> None:
    body = asks.AskGrant(
        capabilities=args.capabilities,
        ttl_s=args.ttl,
        reason=args.reason,
        constraints=_constraints(args),
    )
    grant = await the_daemon().call(operations.POLICY_GRANT, args.name, body=body)
    out.table(grant, _HEADER, [_row(grant)])


def add_revoke(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument("what", metavar="ID|NAME", help="a grant's number, or a machine")
    action.completer = machine_names  # type: ignore[attr-defined]  # argcomplete's convention
    _words(parser, nargs="*")


async def run_revoke(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.capabilities:
        body = asks.Rights(capabilities=args.capabilities)
        gone = await client.call(operations.POLICY_REVOKE_RIGHTS, args.what, body=body)
    elif args.what.isdecimal():
        gone = await client.call(operations.POLICY_REVOKE, args.what)
    else:
        raise Invalid(
            f"{args.what!r} is not a grant's number, and no capability was named",
            hint=f"rayos revoke {args.what} CAP_NET, or rayos revoke ID with an ID of `rayos grants`",
        )
    show(out, gone.grants)


def add_grants(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument("name", nargs="?", metavar="NAME", help="of one machine only")
    action.completer = machine_names  # type: ignore[attr-defined]  # argcomplete's convention


async def run_grants(args: argparse.Namespace, out: Output) -> None:
    found = await the_daemon().call(operations.POLICY_GRANTS, query=asks.GrantsQuery(vm=args.name))
    show(out, found.grants)


def add_delegate(parser: argparse.ArgumentParser) -> None:
    for dest, metavar, what in (("name", "FROM", "who passes on"), ("to", "TO", "who receives")):
        action = parser.add_argument(dest, metavar=metavar, help=what)
        action.completer = machine_names  # type: ignore[attr-defined]  # argcomplete's convention
    _words(parser, nargs="+")
    parser.add_argument(
        "--ttl", type=duration, help="for so long at most (default: as long as what it comes from)"
    )
    _add_constraints(parser)


async def run_delegate(args: argparse.Namespace, out: Output) -> None:
    body = asks.AskDelegation(
        to=args.to, capabilities=args.capabilities, ttl_s=args.ttl, constraints=_constraints(args)
    )
    grant = await the_daemon().call(operations.POLICY_DELEGATE, args.name, body=body)
    out.table(grant, _HEADER, [_row(grant)])

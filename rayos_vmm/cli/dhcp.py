"""Our DHCP: what the server does, whom it gave addresses, what was said, taking back and renewing; and the server
alone on a link.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from rayos_vmm.cli.completion import DAEMON_TIMEOUT_S, add_name, machine_names
from rayos_vmm.cli.output import Output, flatten
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.contract import asks, operations
from rayos_vmm.network.view import DhcpLogs


def _links(**_arguments: Any) -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


def _addresses(**_arguments: Any) -> list[str]:
    """The addresses that a daemon gave out; none when none answers."""
    import trio

    from rayos_vmm.errors import RayosError

    async def addresses() -> list[str]:
        with trio.move_on_after(DAEMON_TIMEOUT_S):
            return [lease.address for lease in await the_daemon().leases()]
        return []

    try:
        return trio.run(addresses)
    except RayosError:
        return []


def add_leases(parser: argparse.ArgumentParser) -> None:
    """Takes nothing but --json."""


async def run_leases(args: argparse.Namespace, out: Output) -> None:
    leases = await the_daemon().leases()
    rows = [
        (
            lease.address,
            lease.mac,
            lease.state,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease.expires)),
            lease.host_name or "-",
        )
        for lease in leases
    ]
    out.table(leases, ("ADDRESS", "MAC", "STATE", "EXPIRES", "HOST NAME"), rows)


def add_dhcp(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(
        dest="verb", metavar="status|leases|release|renew|logs|serve", required=True
    )
    status = verbs.add_parser("status", help="the server, its leases by state, its counters")
    leases = verbs.add_parser("leases", help="the addresses that it gave out")
    release = verbs.add_parser("release", help="take a lease back; its guest has to ask anew")
    action = release.add_argument("address", metavar="ADDRESS")
    action.completer = _addresses  # type: ignore[attr-defined]  # argcomplete's convention
    renew = verbs.add_parser("renew", help="renew the lease that a machine has upstream, now")
    add_name(renew)
    logs = verbs.add_parser(
        "logs", help="the last exchanges of the server and of the machines' upstream clients"
    )
    action = logs.add_argument("name", nargs="?", metavar="NAME", help="of this machine only")
    action.completer = machine_names  # type: ignore[attr-defined]  # argcomplete's convention
    # Here for help and completion; `serve` reads the words itself, and has more options.
    serving = verbs.add_parser("serve", help="serve one link in the foreground, events as JSON lines")
    action = serving.add_argument("--link", required=True)
    action.completer = _links  # type: ignore[attr-defined]  # argcomplete's convention
    serving.add_argument("--subnet", required=True, metavar="ADDRESS/PREFIX")
    for sub in (status, leases, release, renew, logs, serving):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


async def run_dhcp(args: argparse.Namespace, out: Output) -> None:
    client = the_daemon()
    if args.verb == "leases":
        await run_leases(args, out)
    elif args.verb == "release":
        await client.call(operations.DHCP_RELEASE, args.address)
        out.result({"released": args.address}, f"{args.address} is taken back")
    elif args.verb == "renew":
        await client.call(operations.DHCP_RENEW, args.name)
        out.result({"renewing": args.name}, f"{args.name}'s lease is being renewed")
    elif args.verb == "logs":
        logs = await client.call(operations.DHCP_LOGS, query=asks.GrantsQuery(vm=args.name))
        out.table(logs, ("TIME", "WHO", "SAID", "ANSWER", "ADDRESS"), log_rows(logs))
    else:
        status = await client.call(operations.DHCP_STATUS)
        out.table(status, ("DHCP", "VALUE"), flatten(msgspec.to_builtins(status)))


def log_rows(logs: DhcpLogs) -> list[tuple[str, ...]]:
    """The exchanges and transactions as rows, the oldest first."""
    found: list[tuple[float, tuple[str, ...]]] = []
    for one in logs.server:
        who = one.port if one.mac is None else f"{one.port} {one.mac}"
        answer = one.answer or f"none: {one.why}"
        found.append((one.at, (who, one.request or "-", answer, one.address or "-")))
    for vm, history in logs.clients.items():
        for sent in history:
            tries = "" if sent.attempts < 2 else f" x{sent.attempts}"
            found.append((sent.at, (f"{vm} upstream", f"{sent.kind}{tries}", sent.outcome or "-", "-")))
    found.sort(key=lambda row: row[0])
    return [(time.strftime("%H:%M:%S", time.localtime(at)), *row) for at, row in found]


def serve(words: Sequence[str]) -> int:
    """`words` after `rayos dhcp serve`; returns the exit status."""
    from rayos_net.dhcp.command import main

    return main(list(words))

"""The DHCP server as a command: options, events as JSON lines, a clear sentence for each mistake."""

import argparse
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import trio

from rayos_net.dhcp.binding import LeaseEvent
from rayos_net.dhcp.config import ConfigError, Limits, SubnetConfig
from rayos_net.dhcp.service import DhcpError, DhcpService, serve_dhcp, single


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one link until SIGINT or SIGTERM, printing an event per line as JSON; return the exit status."""
    parser = argparse.ArgumentParser(prog="rayos dhcp serve", description="A DHCP server for one link.")
    parser.add_argument("--link", required=True, help="the link to serve; it must have the server's address")
    parser.add_argument("--subnet", required=True, type=IPv4Interface, metavar="ADDRESS/PREFIX")
    parser.add_argument("--store", type=Path, default=Path("leases.db"), help="lease file (%(default)s)")
    parser.add_argument("--pool", type=_range, action="append", default=[], metavar="FIRST-LAST")
    parser.add_argument("--lease-seconds", type=int, default=3600, metavar="N")
    parser.add_argument("--router", type=IPv4Address)
    parser.add_argument("--dns", type=IPv4Address, action="append", default=[])
    parser.add_argument("--domain")
    parser.add_argument("--relay", type=IPv4Network, action="append", default=[], help="believe relays here")
    parser.add_argument("--rapid-commit", action="store_true")
    parser.add_argument("--no-limits", action="store_true", help="no bounds per port: for load tests")
    parser.add_argument("--no-probe", action="store_true", help="no ARP probe before a first offer")
    parser.add_argument("--quiet", action="store_true", help="print no events")
    options = parser.parse_args(argv)
    try:
        subnet = SubnetConfig(
            options.subnet.network,
            options.subnet.ip,
            tuple(options.pool),
            lease_seconds=options.lease_seconds,
            router=options.router,
            dns=tuple(options.dns),
            domain=options.domain,
            relays=tuple(options.relay),
            rapid_commit=options.rapid_commit,
            probe_seconds=0.0 if options.no_probe else 0.1,
            limits=Limits.none() if options.no_limits else Limits(),
        )
    except ConfigError as error:
        print(f"rayos dhcp serve: {error}", file=sys.stderr)
        return 2
    events = None if options.quiet else _print_event
    serve = partial(serve_dhcp, options.link, subnet, store=options.store, events=events)
    try:
        trio.run(_serve_until_signal, serve)
    except DhcpError as error:
        print(f"rayos dhcp serve: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve_until_signal(serve: Callable[..., Awaitable[object]]) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        try:
            async with trio.open_nursery() as nursery:
                service: DhcpService = await nursery.start(serve)
                print(json.dumps({"event": "serving", "link": service.link}), flush=True)
                async for _ in signals:
                    print(json.dumps({"event": "stopped", "counters": service.counters}), flush=True)
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise single(group) from group


def _print_event(event: LeaseEvent) -> None:
    lease = event.binding
    fields = {"event": event.kind.value, "address": str(lease.address), "mac": lease.mac}
    print(json.dumps({**fields, "host_name": lease.host_name, "port": lease.port}), flush=True)


def _range(text: str) -> tuple[IPv4Address, IPv4Address]:
    first, _, last = text.partition("-")
    return IPv4Address(first), IPv4Address(last or first)

"""Events, as they happen and those that are kept."""

from __future__ import annotations

import argparse
import time

from rayos_vmm.cli.completion import machine_names
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import ensure_daemon
from rayos_vmm.events import Event


def _sentence(event: Event) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    data = " ".join(f"{key}={value}" for key, value in event.data.items())
    return f"{event.seq:>6} {clock}.{int(event.time % 1 * 1000):03} {event.vm or '-':<12} {event.type} {data}".rstrip()


def add_events(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument("name", nargs="?", metavar="NAME", help="of one machine only")
    action.completer = machine_names  # type: ignore[attr-defined]  # argcomplete's convention
    parser.add_argument(
        "--since", type=int, help="after this number; 0: all that is kept (default: from now on)"
    )


async def run_events(args: argparse.Namespace, out: Output) -> None:
    client = await ensure_daemon([])
    async with client.events(args.since) as events:
        async for event in events:
            if args.name in (None, event.vm) or event.type == "gap":
                out.line(event, _sentence(event))

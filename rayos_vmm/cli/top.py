"""`rayos top`: machines and devices as they are now, again and again."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

import msgspec
import trio

from rayos_vmm.cli.device import totals
from rayos_vmm.cli.output import Output, render_table
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.errors import Invalid

_HEADER: Final = (
    "MACHINE",
    "DEVICE",
    "OPS/s",
    "BYTES/s",
    "DENIED/s",
    "DEPTH",
    "P50 us <",
    "P99 us <",
    "CPU %",
)


def add_top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="one table, of one interval, and end")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="0.1 to 60 (default: 1)"
    )


async def _snapshot() -> list[dict[str, Any]]:
    answer = msgspec.json.decode(await the_daemon().request("GET", "/devices"))
    machines: list[dict[str, Any]] = answer["machines"]
    return machines


def _latency(device: dict[str, Any], at: str) -> int:
    """Of the operation that was done most."""
    operations = [one for one in device["operations"].values() if one["latency_ns"]["max"]]
    return max(operations, key=lambda one: one["allowed"])["latency_ns"][at] if operations else 0


def _cpu(machine: dict[str, Any]) -> float:
    """Returns the worker's share of one processor between its last two samples."""
    samples = machine["metrics"]
    if len(samples) < 2 or samples[1]["at_ns"] <= samples[0]["at_ns"]:
        return 0.0
    used: int = samples[1]["cpu_ns"] - samples[0]["cpu_ns"]
    taken: int = samples[1]["at_ns"] - samples[0]["at_ns"]
    return used / taken


def rates(before: list[dict[str, Any]], after: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Returns each device's rate a second between two looks; a new machine or device did all of it since."""
    known = {(device["vm"], device["device"]): totals(device) for one in before for device in one["devices"]}
    found = []
    for machine in after:
        for device in machine["devices"]:
            was = known.get((device["vm"], device["device"]), (0, 0, 0))
            # A machine that was started again counts anew.
            did = [
                (now - then if now >= then else now) / seconds
                for now, then in zip(totals(device), was, strict=True)
            ]
            found.append(
                {
                    "vm": device["vm"],
                    "device": device["device"],
                    "operations_per_second": did[0],
                    "denied_per_second": did[1],
                    "bytes_per_second": did[2],
                    "depth": device["depth"],
                    "p50_ns": _latency(device, "p50"),
                    "p99_ns": _latency(device, "p99"),
                    "worker_cpu": _cpu(machine),
                }
            )
    return found


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    took = [f"{one[at] / 1000:.1f}" if one[at] else "-" for at in ("p50_ns", "p99_ns")]
    done = [f"{one[f'{what}_per_second']:.0f}" for what in ("operations", "bytes", "denied")]
    return (one["vm"], one["device"], *done, str(one["depth"]), *took, f"{one['worker_cpu']:.1%}")


async def run_top(args: argparse.Namespace, out: Output) -> None:
    if not 0.1 <= args.interval <= 60:
        raise Invalid(f"an interval of {args.interval} s: 0.1 to 60 are allowed")
    before, clock = await _snapshot(), trio.current_time()
    is_live = not args.once and not out.is_json and sys.stdout.isatty()

    async def step() -> list[dict[str, Any]]:
        nonlocal before, clock
        await trio.sleep(args.interval)
        after, now = await _snapshot(), trio.current_time()
        found = rates(before, after, now - clock)
        before, clock = after, now
        return found

    if not is_live:
        while True:
            found = await step()
            out.table(found, _HEADER, [_row(one) for one in found])
            if args.once:
                return
    from rich.live import Live
    from rich.text import Text

    with Live(Text("…"), auto_refresh=False, screen=True) as live:
        while True:
            rows = [_row(one) for one in await step()]
            live.update(Text(render_table(_HEADER, rows)), refresh=True)

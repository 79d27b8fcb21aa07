"""`rayos top`: machines and devices as they are now, again and again."""

from __future__ import annotations

import argparse
import sys
from typing import Final

import msgspec
import trio

from rayos_vmm.cli.device import totals
from rayos_vmm.cli.output import Output, render_table
from rayos_vmm.cli.terminal import raw_terminal, read_input
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.contract import operations
from rayos_vmm.errors import Invalid
from rayos_vmm.guest.view import DeviceView, MachineFigures

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


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """A device's rates a second, and its worker's share of one processor."""

    vm: str
    device: str
    operations_per_second: float
    denied_per_second: float
    bytes_per_second: float
    depth: int
    p50_ns: int
    p99_ns: int
    worker_cpu: float


async def _snapshot() -> list[MachineFigures]:
    return (await the_daemon().call(operations.DEVICE_OVERVIEW)).machines


def _latency(device: DeviceView, at: str) -> int:
    """Of the operation that was done most."""
    done = [one for one in device.operations.values() if one.latency_ns["max"]]
    return max(done, key=lambda one: one.allowed).latency_ns[at] if done else 0


def _cpu(machine: MachineFigures) -> float:
    """Returns the worker's share of one processor between its last two samples."""
    samples = machine.metrics
    if len(samples) < 2 or samples[1].at_ns <= samples[0].at_ns:
        return 0.0
    used: int = samples[1].cpu_ns - samples[0].cpu_ns
    taken: int = samples[1].at_ns - samples[0].at_ns
    return used / taken


def rates(before: list[MachineFigures], after: list[MachineFigures], seconds: float) -> list[Rate]:
    """Returns each device's rate a second between two looks; a new machine or device did all of it since."""
    known = {(device.vm, device.device): totals(device) for one in before for device in one.devices}
    found = []
    for machine in after:
        for device in machine.devices:
            was = known.get((device.vm, device.device), (0, 0, 0))
            # A machine that was started again counts anew.
            did = [
                (now - then if now >= then else now) / seconds
                for now, then in zip(totals(device), was, strict=True)
            ]
            found.append(
                Rate(
                    vm=device.vm,
                    device=device.device,
                    operations_per_second=did[0],
                    denied_per_second=did[1],
                    bytes_per_second=did[2],
                    depth=device.depth,
                    p50_ns=_latency(device, "p50"),
                    p99_ns=_latency(device, "p99"),
                    worker_cpu=_cpu(machine),
                )
            )
    return found


def _row(one: Rate) -> tuple[str, ...]:
    took = [f"{ns / 1000:.1f}" if ns else "-" for ns in (one.p50_ns, one.p99_ns)]
    rates = (one.operations_per_second, one.bytes_per_second, one.denied_per_second)
    done = [f"{rate:.0f}" for rate in rates]
    return (one.vm, one.device, *done, str(one.depth), *took, f"{one.worker_cpu:.1%}")


async def run_top(args: argparse.Namespace, out: Output) -> None:
    if not 0.1 <= args.interval <= 60:
        raise Invalid(f"an interval of {args.interval} s: 0.1 to 60 are allowed")
    before, clock = await _snapshot(), trio.current_time()
    is_live = not args.once and not out.is_json and sys.stdout.isatty()

    async def step() -> list[Rate]:
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

    async def until_q() -> None:
        while (typed := await read_input(0)) and not set(typed) & set(b"qQ"):
            pass
        nursery.cancel_scope.cancel()

    with raw_terminal(0, keeps_signals=True), Live(Text("…"), auto_refresh=False, screen=True) as live:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_q)
            while True:
                rows = [_row(one) for one in await step()]
                live.update(Text(render_table(_HEADER, rows) + "\nq leaves"), refresh=True)

"""Measures the cost of the workers' sandbox: `make bench-sandbox`.

The same keeper and worker with all layers and with none (`RAYOS_SANDBOX=off`), in turns: how long until the worker
serves, and how many requests of 4 KiB it reads from the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from benchmarks.blk import Case, measure
from benchmarks.frontend import build_loads
from benchmarks.report import Series, publish, table
from benchmarks.scale import children
from benchmarks.servers import Server, fill_cache, make_image, workspace
from rayos_vmm.hardware.launch import Spawner, stop_keeper
from rayos_vmm.host.identity import claim
from rayos_vmm.shared.spec import Device

MODES = ("off", "on")
CASES = (Case("hot", 1), Case("hot", 32), Case("hot", 32, pinned=True))
IMAGE_BYTES = 256 << 20


@asynccontextmanager
async def worker(folder: Path, mode: str, image: Path) -> AsyncIterator[tuple[Server, float]]:
    """A worker with one disk, and the milliseconds until it served. Every mode has a parent that forks its keepers."""
    os.environ["RAYOS_SANDBOX"] = mode
    run_dir = folder / f"{mode}{time.monotonic_ns()}"
    run_dir.mkdir()
    fd = os.open(image, os.O_RDONLY)
    async with Spawner() as spawner:
        first = run_dir / "first"
        first.mkdir()
        await stop_keeper(
            await spawner.start_keeper("first", first, [], first / "log")
        )  # the code is loaded now
        try:
            devices = [Device(kind="blk", name="disk", fd=fd, read_only=True)]
            with claim() as identity:
                began = time.monotonic()
                keeper = await spawner.start_keeper(
                    "bench", run_dir, devices, run_dir / "log", identity=identity, memory_bytes=96 << 20
                )
                client = keeper.worker()
                await client.stats()
                client.close()
                taken = (time.monotonic() - began) * 1000
        finally:
            os.close(fd)
        try:
            (pid,) = children(keeper.pid)
            yield Server(mode, pid, keeper.socket("disk"), image), taken
        finally:
            with trio.CancelScope(shield=True):
                await stop_keeper(keeper)


async def compare(folder: Path, rounds: int, seconds: float) -> list[list[str]]:
    image = make_image(folder / "image", IMAGE_BYTES)
    fill_cache(image)
    starts: dict[str, list[float]] = {mode: [] for mode in MODES}
    series = {(case, mode): Series() for case in CASES for mode in MODES}
    for number in range(rounds):
        for mode in MODES if number % 2 else MODES[::-1]:
            async with worker(folder, mode, image) as (server, taken):
                starts[mode].append(taken)
                for case in CASES:
                    rate, cpu = measure(server, case, seconds)
                    series[case, mode].rates.append(rate)
                    series[case, mode].cpus.append(cpu)
    off, on = (statistics.median(starts[mode]) for mode in MODES)
    rows = [["start, ms", f"{off:.1f}", f"{on:.1f}", f"{on - off:+.1f} ms", ""]]
    for case in CASES:
        bare, boxed = (series[case, mode] for mode in MODES)
        figures = [f"{one.rate / 1e3:.1f} {one.spread}" for one in (bare, boxed)]
        rows.append(
            [f"{case.name}, k/s", *figures, f"{boxed.rate / bare.rate:.2f}", f"{boxed.cpu / bare.cpu:.2f}"]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each run")
    parser.add_argument("--no-append", action="store_true", help="leave docs/performance.md alone")
    arguments = parser.parse_args()
    build_loads()
    with workspace() as (folder, _):
        rows = trio.run(compare, folder, arguments.rounds, arguments.seconds)
    head = ["a worker with a disk", "no sandbox", "sandbox", "difference", "CPU an operation"]
    publish("what the sandbox costs", table(head, rows), append=not arguments.no_append)


if __name__ == "__main__":
    main()

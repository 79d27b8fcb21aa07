"""A policy change on its way to 64 workers: `make bench-policy`.

The service's own authority, revisions and broadcaster, and real sandboxed workers, 4 in each of 16 zones; no guest.
*all applied* is from the moment a change is in force on the gate pages until the last of the workers has said that it
applied it; *apply* is the whole call with its audit record and its place in the store (two syncs of the disk).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio

from benchmarks.report import publish, table
from rayos_vmm.hardware.launch import Keeper, Spawner, stop_keeper
from rayos_vmm.host.identity import claim
from rayos_vmm.policy.authority import open_authority
from rayos_vmm.policy.hierarchy import Place
from rayos_vmm.policy.revisions import Revisions, load_book
from rayos_vmm.service.store import open_store
from rayos_vmm.shared.spec import Device

TARGET_MS = 10.0


async def start(
    revisions: Revisions, spawner: Spawner, folder: Path, number: int, stack: AsyncExitStack
) -> None:
    """A machine of the policy and its worker, which ends with the stack."""
    vm, authority = f"vm{number}", revisions.authority
    run_dir = folder / vm
    run_dir.mkdir()
    await authority.define(vm, ["all"], Place(zone=f"zone{number % 16}"))
    page = os.open(authority.open(vm, run_dir, is_new=True), os.O_RDONLY)
    with claim() as identity:
        devices = [Device(kind="console", name="console")]
        keeper = await spawner.start_keeper(
            vm, run_dir, devices, folder / f"{vm}.log", identity=identity, gate_fd=page
        )
    os.close(page)
    stack.push_async_callback(_stop, keeper)
    revisions.broadcaster.attach(vm, run_dir)


async def _stop(keeper: Keeper) -> None:
    with trio.CancelScope(shield=True):
        await stop_keeper(keeper)


async def measure(count: int, changes: int) -> tuple[list[float], list[float], float]:
    """(ms until all have applied each change, ms of each call, rate of success)."""
    calls = []
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayos-bench-", dir="/tmp")))
        store = await stack.enter_async_context(open_store(folder / "db"))
        book, kept = await load_book(store)
        authority = await stack.enter_async_context(open_authority(store, folder / "audit", book=book))
        revisions = Revisions(store, authority, kept)
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(revisions.broadcaster.run)
        stack.callback(nursery.cancel_scope.cancel)
        document: dict[str, Any] = {
            "zone": {f"zone{number}": {} for number in range(16)},
            "host": {"rules": {}},
        }
        await revisions.apply(document)
        spawner = await stack.enter_async_context(Spawner())
        for number in range(count):
            await start(revisions, spawner, folder, number, stack)
        state = revisions.broadcaster.distribution
        while any(target.lag or target.applied < 0 for target in state.targets.values()):
            await revisions.broadcaster.changed()
        state.broadcasts.clear()
        for number in range(changes):
            document["host"] = {"rules": {"limit": {"kind": "resource", "input_queue": number + 1}}}
            began = trio.current_time()
            await revisions.apply(document)
            calls.append((trio.current_time() - began) * 1000)
            while state.broadcasts[-1].latency_s is None:
                await revisions.broadcaster.changed()
        latencies = [(entry.latency_s or 0.0) * 1000 for entry in state.broadcasts]
        return latencies, calls, state.view().success_rate or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--no-append", action="store_true", help="leave docs/performance.md alone")
    arguments = parser.parse_args()
    rows = []
    for count in (1, 8, 64):
        latencies, calls, success = trio.run(measure, count, arguments.changes)
        centiles = statistics.quantiles(latencies, n=20)
        rows.append(
            [
                str(count),
                f"{statistics.median(latencies):.2f}",
                f"{centiles[-1]:.2f}",
                f"{statistics.median(calls):.2f}",
                f"{success:.1%}",
            ]
        )
        print(*rows[-1], flush=True)
    head = ["workers", "all applied, median ms", "95 % ms", "apply, median ms", "success"]
    body = table(head, rows) + f"\n\nTarget: 64 workers within {TARGET_MS:g} ms at the median."
    publish("a policy change reaches the workers", body, append=not arguments.no_append)


if __name__ == "__main__":
    main()

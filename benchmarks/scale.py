"""Many VMs' workers: how long they take to start, what each costs, and eight disks busy at once: `make bench-scale`.

A worker is started as the service does it: by the parent of all keepers (`rayos_vmm/worker/spawner.py`), which has the
code loaded; a start is over when the worker serves. Memory is private memory (USS: what would come back if it ended).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import trio

from benchmarks.blk import Case, measure
from benchmarks.frontend import build_loads
from benchmarks.report import publish, table
from benchmarks.servers import Server, fill_cache, make_image, ours, qemu_storage_daemon, serve, workspace
from rayos_vmm.hardware.launch import Keeper, Spawner, stop_keeper
from rayos_vmm.host.identity import claim
from rayos_vmm.shared.spec import Device

COUNTS = (1, 8, 64)


def private_bytes(pid: int) -> int:
    """Memory that nobody shares with this process."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean", "Private_Dirty")):
            total += int(line.split()[1]) * 1024
    return total


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


@dataclass(frozen=True)
class Start:
    """Of `count` VMs: seconds until all serve, CPU seconds it took, median MiB private of a keeper and a worker."""

    seconds: float
    cpu: float
    keeper: float
    worker: float


async def start_keepers(folder: Path, count: int) -> Start:
    images = []
    async with Spawner() as spawner:
        first = folder / "first"
        first.mkdir()
        await stop_keeper(
            await spawner.start_keeper("first", first, [], first / "log")
        )  # the code is loaded now

        keepers: list[Keeper] = []

        async def start(index: int, image: int) -> None:
            run_dir = folder / f"vm{index}"
            run_dir.mkdir()
            devices = [
                Device(kind="blk", name="disk", fd=image),
                Device(kind="gpu", name="gpu"),
                Device(kind="input", name="keyboard"),
                Device(kind="console", name="console"),
            ]
            with claim() as identity:
                keeper = await spawner.start_keeper(
                    f"vm{index}", run_dir, devices, run_dir / "log", identity=identity, memory_bytes=96 << 20
                )
            keepers.append(keeper)
            worker = keeper.worker()
            await worker.stats()
            worker.close()

        try:
            for index in range(count):
                images.append(os.open(make_image(folder / f"disk{index}", 1 << 20), os.O_RDWR))
            started, before = time.monotonic(), _cpu_seconds()
            async with trio.open_nursery() as nursery:
                for index, image in enumerate(images):
                    nursery.start_soon(start, index, image)
            seconds, after = time.monotonic() - started, _cpu_seconds()
            await trio.sleep(1.0)
            return Start(
                seconds,
                after - before,
                statistics.median(private_bytes(keeper.pid) / (1 << 20) for keeper in keepers),
                statistics.median(
                    private_bytes(child) / (1 << 20) for keeper in keepers for child in children(keeper.pid)
                ),
            )
        finally:
            with trio.CancelScope(shield=True):
                for keeper in keepers:
                    await stop_keeper(keeper)
            for image in images:
                os.close(image)


def _cpu_seconds() -> float:
    """Of all processors of this machine, not idle, since it started (proc_stat(5))."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def eight_disks(depth: int, rounds: int) -> tuple[float, float]:
    """Requests a second of eight disks together, (QSD, ours): a server and a driver thread's process each."""
    rates: dict[str, list[float]] = {"qsd": [], "ours": []}
    with workspace() as (folder, stack):
        groups = {name: _eight(folder, stack, name) for name in rates}
        for _ in range(rounds):
            for name, group in groups.items():
                rates[name].append(_together(group, depth))
    return statistics.median(rates["qsd"]), statistics.median(rates["ours"])


def _eight(folder: Path, stack: ExitStack, name: str) -> list[Server]:
    servers = []
    for index in range(8):
        image = (
            make_image(folder / f"{name}{index}.img", 256 << 20) if index == 0 else folder / f"{name}0.img"
        )
        path = folder / f"{name}{index}.sock"
        if name == "qsd":
            command = qemu_storage_daemon(path, image)
        else:
            command = ours("blk", "--socket", str(path), "--image", str(image), "--read-only")
        servers.append(stack.enter_context(serve(name, path, command, image)))
    fill_cache(folder / f"{name}0.img")
    return servers


def _together(servers: list[Server], depth: int) -> float:
    """A process a driver, so that they do not share an interpreter."""
    pids = []
    reads = []
    for server in servers:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                rate, _ = measure(server, Case("hot", depth), 1.0)
                os.write(write, str(rate).encode())
            finally:
                os._exit(0)
        os.close(write)
        pids.append(pid)
        reads.append(read)
    total = 0.0
    for pid, read in zip(pids, reads, strict=True):
        total += float(os.read(read, 64) or b"nan")
        os.close(read)
        os.waitpid(pid, 0)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-append", action="store_true", help="leave docs/performance.md alone")
    arguments = parser.parse_args()
    assert threading.active_count() == 1, "it forks"
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    build_loads()
    rows = []
    for count in COUNTS:
        with workspace() as (folder, _):
            found = trio.run(start_keepers, folder, count)
        rows.append(
            [
                str(count),
                f"{found.seconds:.2f}",
                f"{found.cpu:.2f}",
                f"{found.keeper:.1f}",
                f"{found.worker:.1f}",
                f"{found.keeper + found.worker:.1f}",
            ]
        )
        print(*rows[-1], flush=True)
    head = ["VMs", "start s", "machine's CPU s", "keeper MiB", "worker MiB", "both MiB"]
    body = table(head, rows)
    rows = []
    for depth in (1, 8):
        peer, side = eight_disks(depth, arguments.rounds)
        rows.append([f"8 disks, QD {depth}", f"{side / peer:.2f}", f"{peer / 1e3:.0f}", f"{side / 1e3:.0f}"])
        print(*rows[-1], flush=True)
    body += "\n\n" + table(["work", "× QSD", "QSD k/s", "ours k/s"], rows)
    publish("many workers", body, append=not arguments.no_append)


if __name__ == "__main__":
    main()

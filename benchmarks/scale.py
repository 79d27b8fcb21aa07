"""Many VMs' workers: how long they take to start, what each costs, and eight disks busy at once: `make bench-scale`.

A worker is started as the service does it: a keeper process (`python -P -m rayos_vmm.worker`) that forks its worker.
Memory is private memory (USS: what would come back if it ended) of both; *forked* stands for workers forked from one
process that has the code loaded already.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.blk import Case, measure
from benchmarks.frontend import build_loads
from benchmarks.report import publish, table
from benchmarks.servers import Server, fill_cache, make_image, ours, qemu_storage_daemon, serve, workspace

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


def start_keepers(folder: Path, count: int) -> tuple[float, float, float]:
    """(seconds until all serve, MiB private of a keeper, MiB private of a worker)."""
    processes = []
    specs = []
    images = []
    for index in range(count):
        run_dir = folder / f"vm{count}-{index}"
        run_dir.mkdir()
        image = os.open(make_image(run_dir / "disk", 1 << 20), os.O_RDWR)
        images.append(image)
        devices = [
            {"kind": "blk", "name": "disk", "fd": image},
            {"kind": "gpu", "name": "gpu"},
            {"kind": "input", "name": "keyboard"},
            {"kind": "console", "name": "console"},
        ]
        specs.append(json.dumps({"vm": f"vm{index}", "run_dir": str(run_dir), "devices": devices}).encode())
    started = time.monotonic()
    try:
        for spec, image in zip(specs, images, strict=True):
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rayos_vmm.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[image],
            )
            processes.append(process)
            assert process.stdin is not None
            process.stdin.write(spec)
            process.stdin.close()
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit("a keeper did not start")
        elapsed = time.monotonic() - started
        time.sleep(1.0)
        keepers = [private_bytes(process.pid) / (1 << 20) for process in processes]
        workers = [
            private_bytes(child) / (1 << 20) for process in processes for child in children(process.pid)
        ]
        return elapsed, statistics.median(keepers), statistics.median(workers)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        for image in images:
            os.close(image)


def forked(count: int) -> tuple[float, float]:
    """(seconds, MiB private each) of `count` processes forked from one that has loaded the worker's code."""
    code = (
        "import os, sys, gc, time, signal\n"
        "import rayos_vmm.worker.main\n"
        "gc.freeze(); start = time.monotonic(); pids = []\n"
        "for _ in range(int(sys.argv[1])):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        from devices.loop import Loop; loop = Loop(); signal.pause()\n"
        "    pids.append(pid)\n"
        "print(time.monotonic() - start, *pids, flush=True); sys.stdin.read()\n"
        "[os.kill(pid, 9) for pid in pids]\n"
    )
    command = [sys.executable, "-P", "-c", code, str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        seconds, *pids = process.stdout.readline().split()
        time.sleep(0.3)
        each = statistics.median(private_bytes(int(pid)) / (1 << 20) for pid in pids)
        return float(seconds), each
    finally:
        process.communicate()


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
            seconds, keeper, worker = start_keepers(folder, count)
        fork_seconds, fork_each = forked(count)
        rows.append(
            [
                str(count),
                f"{seconds:.2f}",
                f"{keeper:.1f}",
                f"{worker:.1f}",
                f"{fork_seconds:.2f}",
                f"{fork_each:.1f}",
            ]
        )
        print(*rows[-1], flush=True)
    head = ["VMs", "start s", "keeper MiB", "worker MiB", "forked: start s", "forked: MiB each"]
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

"""Time of one request alone, kick to call, as a driver that sleeps sees it: `make bench-latency`.

Percentiles of a single 4 KiB read from the page cache, interleaved with qemu-storage-daemon, and ours with a polling
budget of 50 µs beside it (off by default). The wake-ups of both processes are inside the figure.
"""

from __future__ import annotations

import argparse
import os

from benchmarks.blk import BLOCK, IMAGE_BYTES, LAYOUT, QUEUE_SIZE, RAM_BYTES, SPIN_IDLE, start
from benchmarks.frontend import build_loads
from benchmarks.frontend.session import Session
from benchmarks.report import publish, table
from benchmarks.servers import Server, fill_cache, workspace

SAMPLES = 3000


def sample(server: Server, count: int) -> list[float]:
    """Microseconds of `count` requests, one at a time, sorted."""
    from benchmarks.frontend.load import BlkLoad

    session = Session(server.path, RAM_BYTES, 0)
    kick, call = session.start(0, QUEUE_SIZE, *LAYOUT[:3])
    try:
        load = BlkLoad(session.ram, kick, call, QUEUE_SIZE, LAYOUT)
        load.prepare(1, BLOCK, False, False)
        times = []
        for _ in range(count):
            done, elapsed = load.run(1, BLOCK, IMAGE_BYTES // 512, 0.0, False, SPIN_IDLE)
            times.append(elapsed / done * 1e6)
    finally:
        session.close()
        os.close(kick)
        os.close(call)
    return sorted(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-append", action="store_true", help="leave docs/performance.md alone")
    arguments = parser.parse_args()
    build_loads()
    times: dict[str, list[float]] = {}
    with workspace() as (folder, stack):
        servers = start(folder, stack, ["qsd", "ours", "poll50"], direct=False)
        for server in servers:
            assert server.image is not None
            fill_cache(server.image)
        for _ in range(arguments.rounds):
            for server in servers:
                times.setdefault(server.name, []).extend(sample(server, SAMPLES))
    rows = []
    for name, values in times.items():
        values.sort()
        figures = [f"{values[int(len(values) * part)]:.1f}" for part in (0.5, 0.9, 0.99, 0.999)]
        rows.append([name, *figures])
    body = table(["side", "p50 µs", "p90 µs", "p99 µs", "p99.9 µs"], rows)
    publish("latency of one 4 KiB read, page cache", body, append=not arguments.no_append)


if __name__ == "__main__":
    main()

"""4 KiB requests against qemu-storage-daemon with io_uring, interleaved: `make bench-blk`.

Both sides serve a raw image of their own over vhost-user to the same compiled driver, one after the other, again and
again; a row is the median of the rounds. *idle*: the driver sleeps while it waits, as a guest does. *pinned*: driver
and server on a core each, and the driver polls. Latency and guests are not hidden in it: see `make bench-latency`.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.frontend import build_loads
from benchmarks.frontend.session import Session
from benchmarks.report import Series, publish, table
from benchmarks.servers import (
    Server,
    alone,
    fill_cache,
    forget_cache,
    make_image,
    ours,
    qemu_storage_daemon,
    serve,
    workspace,
)

IMAGE_BYTES = 256 << 20
BLOCK = 4096
QUEUE_SIZE = 1024
#: Guest addresses of table, avail, used, headers, data, statuses, indirect tables.
LAYOUT = (0x10000, 0x20000, 0x30000, 0x40000, 0x100000, 0x50000, 0x60000)
RAM_BYTES = 16 << 20
#: VIRTIO_BLK_F_FLUSH: without it a device writes through, and so does ours.
F_FLUSH = 1 << 9
#: Fruitless looks at the used ring before the driver sleeps.
SPIN_IDLE, SPIN_PINNED = 200, 1 << 30


@dataclass(frozen=True)
class Case:
    """One row. `kind`: hot, cold or direct."""

    kind: str
    depth: int
    write: bool = False
    pinned: bool = False

    @property
    def name(self) -> str:
        regime = "pinned" if self.pinned else "idle"
        return f"{self.kind} {'write' if self.write else 'read'} QD {self.depth}, {regime}"

    @property
    def indirect(self) -> bool:
        return self.depth > 64


CASES = (
    *(Case("hot", depth, pinned=pinned) for pinned in (False, True) for depth in (1, 8, 32, 128)),
    Case("hot", 32, write=True, pinned=True),
    Case("hot", 32, write=True),
    *(Case(kind, depth) for kind in ("cold", "direct") for depth in (1, 32)),
)


def measure(server: Server, case: Case, seconds: float) -> tuple[float, float]:
    """(requests a second, CPU microseconds of the server per request)."""
    from benchmarks.frontend.load import BlkLoad

    assert server.image is not None
    if case.kind == "cold":
        forget_cache(server.image)
    if case.pinned:
        server.pin({0})
        os.sched_setaffinity(0, {1})
    session = Session(server.path, RAM_BYTES, F_FLUSH)
    kick, call = session.start(0, QUEUE_SIZE, *LAYOUT[:3])
    try:
        load = BlkLoad(session.ram, kick, call, QUEUE_SIZE, LAYOUT)
        load.prepare(case.depth, BLOCK, case.write, case.indirect)
        before = server.cpu_seconds
        spin = SPIN_PINNED if case.pinned else SPIN_IDLE
        done, elapsed = load.run(case.depth, BLOCK, IMAGE_BYTES // 512, seconds, case.indirect, spin)
        used = server.cpu_seconds - before
        if load.errors:
            raise SystemExit(f"{server.name}: {load.errors} requests of {case.name} failed")
    finally:
        session.close()
        os.close(kick)
        os.close(call)
        everywhere = set(range(os.cpu_count() or 1))
        server.pin(everywhere)
        os.sched_setaffinity(0, everywhere)
    time.sleep(0.05)
    return done / elapsed, used / done * 1e6


def start(folder: Path, stack: ExitStack, names: list[str], *, direct: bool) -> list[Server]:
    servers = []
    for name in names:
        image = folder / f"{name}.img"
        if not image.exists():
            make_image(image, IMAGE_BYTES)
        path = folder / f"{name}-{'direct' if direct else 'cached'}.sock"
        environment = {"RAYOS_PURE": "1"} if name == "interpreted" else {}
        if name == "qsd":
            command = qemu_storage_daemon(path, image, direct=direct)
        else:
            options = ["--direct"] if direct else []
            options += ["--poll-us", name.removeprefix("poll")] if name.startswith("poll") else []
            command = ours("blk", "--socket", str(path), "--image", str(image), *options)
        servers.append(stack.enter_context(serve(name, path, command, image, **environment)))
    return servers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument(
        "--sides", default="ours", help="ours, interpreted, poll50 (50 µs of polling); comma-separated"
    )
    parser.add_argument("--no-append", action="store_true", help="leave docs/performance.md alone")
    arguments = parser.parse_args()
    build_loads()
    names = ["qsd", *arguments.sides.split(",")]
    rows = []
    for direct in (False, True):
        cases = [case for case in CASES if arguments.only in case.name and (case.kind == "direct") == direct]
        if not cases:
            continue
        with workspace() as (folder, stack):
            servers = start(folder, stack, names, direct=direct)
            for case in cases:
                if case.kind == "hot":
                    for server in servers:
                        assert server.image is not None
                        fill_cache(server.image)
                series = {server.name: Series() for server in servers}
                for _ in range(arguments.rounds):
                    for server in servers:
                        with alone(server, servers):
                            rate, cpu = measure(server, case, arguments.seconds)
                        series[server.name].rates.append(rate)
                        series[server.name].cpus.append(cpu)
                peer = series["qsd"]
                for name in names[1:]:
                    side = series[name]
                    ratio = [
                        f"{side.rate / peer.rate:.2f}",
                        f"{side.cpu / peer.cpu:.2f}" if peer.cpu else "-",
                    ]
                    figures = [f"{s.rate / 1e3:.1f} {s.spread}" for s in (peer, side)]
                    rows.append([case.name, name, *ratio, *figures, f"{peer.cpu:.1f}", f"{side.cpu:.1f}"])
                    print(*rows[-1], flush=True)
    head = ["work", "side", "× QSD", "CPU × QSD", "QSD k/s", "ours k/s", "QSD µs/op", "ours µs/op"]
    publish(
        "blk, 4 KiB random, against qemu-storage-daemon", table(head, rows), append=not arguments.no_append
    )


if __name__ == "__main__":
    main()

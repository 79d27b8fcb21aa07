"""Frames against DPDK's vhost port (testpmd, busy polling, on a core of its own), interleaved: `make bench-net`.

The same compiled driver sends as fast as the ring takes frames. *TX*: the server throws them away. *echo*: it swaps the
Ethernet addresses and sends them back. Our side has gate, bucket, counters and latency samples in place; `no bucket`
beside it is the same without a bucket; `firewall` has 64 rules and the spoof guard as well; `polling` looks for work up
to 50 µs before it sleeps, where DPDK looks without end. Driver and server have a core each; the other servers stand
still meanwhile.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.frontend import build_loads
from benchmarks.frontend.session import EVENT_IDX, Session
from benchmarks.guarded import ADDRESS, MAC
from benchmarks.report import Series, publish, table
from benchmarks.servers import Server, alone, ours, serve, workspace

QUEUE_SIZE = 256
RAM_BYTES = 8 << 20
DATA = 0x200000
MRG_RXBUF = 1 << 15
HEADER_BYTES = 12
RX_LAYOUT = (0x10000, 0x20000, 0x30000)
TX_LAYOUT = (0x40000, 0x50000, 0x60000)
WINDOW = 192
#: Far above what anybody reaches: the bucket is asked and paid, and never empty.
RATE = 100e9
POLL_US = 50


@dataclass(frozen=True)
class Case:
    """One row."""

    length: int
    is_echo: bool

    @property
    def name(self) -> str:
        return f"{'echo' if self.is_echo else 'TX'} {self.length} B"


CASES = (Case(64, False), Case(64, True), Case(1500, False), Case(1500, True))


def testpmd(path: Path, *, is_echo: bool) -> list[str]:
    mode = "macswap" if is_echo else "rxonly"
    return [
        *("dpdk-testpmd", "-l", "0,1", "--no-huge", "-m", "256", "--no-pci", "--file-prefix", path.stem),
        *("--vdev", f"net_vhost0,iface={path},queues=1", "--"),
        *(
            f"--forward-mode={mode}",
            "--port-topology=loop",
            "--auto-start",
            "--total-num-mbufs=8192",
            "--no-flush-rx",
        ),
    ]


def udp_frame(length: int) -> bytes:
    """A datagram of the guest that `benchmarks.guarded` knows, `length` bytes from its Ethernet header on."""
    udp = struct.pack(">HHHH", 1000, 2000, length - 34, 0)
    addresses = struct.pack(">II", ADDRESS, ADDRESS + 1)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, length - 14, 0, 0, 64, 17, 0) + addresses
    return b"\x02\0\0\0\0\x01" + MAC + b"\x08\0" + ip + udp + bytes(length - 42)


def measure(server: Server, case: Case, seconds: float) -> tuple[float, float]:
    """(frames a second, CPU microseconds of the server per frame)."""
    from benchmarks.frontend.netload import NetLoad, Queue

    if server.name != "dpdk":
        server.pin({1})
    os.sched_setaffinity(0, {0})
    session = Session(server.path, RAM_BYTES, MRG_RXBUF)
    fds: list[int] = []
    try:
        frame = udp_frame(case.length)
        for slot in range(QUEUE_SIZE):
            at = DATA + 2048 * slot
            session.ram[at : at + HEADER_BYTES + case.length] = bytes(HEADER_BYTES) + frame
        queues = []
        for index, layout in enumerate((RX_LAYOUT, TX_LAYOUT)):
            kick, call = session.start(index, QUEUE_SIZE, *layout)
            fds += [kick, call]
            queues.append(Queue(session.ram, kick, QUEUE_SIZE, *layout, bool(session.features & EVENT_IDX)))
        rx, tx = queues
        load = NetLoad(rx, tx, DATA, case.length)
        load.run(0.05, case.is_echo, WINDOW)
        before = server.cpu_seconds
        sent, back, elapsed = load.run(seconds, case.is_echo, WINDOW)
        used = server.cpu_seconds - before
    finally:
        session.close()
        for fd in fds:
            os.close(fd)
        everywhere = set(range(os.cpu_count() or 1))
        os.sched_setaffinity(0, everywhere)
    time.sleep(0.1)
    done = back if case.is_echo else sent
    if not done:
        raise SystemExit(f"{server.name}: no frame of {case.name} went through")
    return done / elapsed, used / done * 1e6


def guarded(path: Path, *words: str) -> list[str]:
    command = (sys.executable, "-P", "-m", "benchmarks.guarded", "--socket", str(path), "--rate", str(RATE))
    return [*command, *words]


def start(folder: Path, stack: ExitStack, *, is_echo: bool) -> list[Server]:
    port = "--echo" if is_echo else "--sink"
    commands: dict[str, Callable[[Path], list[str]]] = {
        "dpdk": lambda path: testpmd(path, is_echo=is_echo),
        "ours": lambda path: ours("net", "--socket", str(path), port, "--rate", str(RATE)),
        "polling": lambda path: ours(
            *("net", "--socket", str(path), port, "--rate", str(RATE), "--poll-us", str(POLL_US))
        ),
        "firewall": lambda path: guarded(path, port),
        "firewall, polling": lambda path: guarded(path, port, "--poll-us", str(POLL_US)),
        "no bucket": lambda path: ours("net", "--socket", str(path), port),
    }
    servers = []
    for name, command in commands.items():
        path = folder / f"{name.replace(' ', '').replace(',', '')}{port}.sock"
        servers.append(stack.enter_context(serve(name, path, command(path))))
    return servers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.7, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--no-append", action="store_true", help="leave docs/performance.md alone")
    arguments = parser.parse_args()
    build_loads()
    rows = []
    for is_echo in (False, True):
        cases = [case for case in CASES if arguments.only in case.name and case.is_echo == is_echo]
        if not cases:
            continue
        with workspace() as (folder, stack):
            servers = start(folder, stack, is_echo=is_echo)
            for case in cases:
                series = {server.name: Series() for server in servers}
                for _ in range(arguments.rounds):
                    for server in servers:
                        with alone(server, servers):
                            rate, cpu = measure(server, case, arguments.seconds)
                        series[server.name].rates.append(rate)
                        series[server.name].cpus.append(cpu)
                peer = series.pop("dpdk")
                for name, side in series.items():
                    figures = [f"{s.rate / 1e6:.2f} {s.spread}" for s in (peer, side)]
                    rows.append(
                        [
                            case.name,
                            name,
                            f"{side.rate / peer.rate:.2f}",
                            *figures,
                            f"{peer.cpu:.2f}",
                            f"{side.cpu:.2f}",
                        ]
                    )
                    print(*rows[-1], flush=True)
    head = ["work", "side", "× DPDK", "DPDK M/s", "ours M/s", "DPDK µs/frame", "ours µs/frame"]
    publish("net, against DPDK's vhost port", table(head, rows), append=not arguments.no_append)


if __name__ == "__main__":
    main()

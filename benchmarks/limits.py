"""Measures the cost of the checks: compiled loops with and without them, on a full ring (`make bench-limits`).

*Without* is a copy of the sources from which gate, bucket, counters and latency samples were taken out, compiled the
same way; all are run alternately, each in a process of its own, and counted in CPU time. There is no driver process,
nobody sleeps, and the sink does nothing, so the share of the checks is larger here than in any use; the tap (as root)
is the use. A frame's checks are those, and the firewall of 64 rules with the spoof guard, which knows its flow.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: (file, what is there, what stands there without checks)
REMOVED = (
    ("blk/ring.py", "            or not self.gate.allows(operation)\n", ""),
    ("blk/ring.py", "            self.stats.count(operation, length)\n", ""),
    ("blk/ring.py", "(self.served - 1) & self.stats.sample_mask == 0", "False"),
    ("net/ring.py", "        if not self._mask[0] >> TX_OP & 1:\n", "        if False:\n"),
    ("net/ring.py", "\n        self._is_sampled = True\n", "\n"),
    ("net/ring.py", "        if self._accepted == 0:\n", "        if False:\n"),
    ("net/ring.py", "        if self._turn & self.stats.sample_mask == 0:\n", "        if False:\n"),
    ("net/ring.py", "        self.stats.count(operation, size)\n", "        return\n"),
)
WORK = {
    "blk": "blk 4 KiB read, page cache",
    "net": "net TX 64 B into a sink",
    "echo": "net echo 64 B, one process",
    "echo1500": "net echo 1500 B, one process",
    "tap": "net TX 64 B into a tap",
}
TAP = "raybenchlimits"
SIZE = 256
BLOCK = 4096
IMAGE_BYTES = 4 << 20
SECONDS = 0.4
ROUNDS = 5
F_ADD_SEALS = 1033
DESC, AVAIL, USED, HEADERS, STATUSES, DATA = 0x1000, 0x4000, 0x5000, 0x8000, 0xA000, 0x20000
#: Of the queue that receives.
RX_DESC, RX_AVAIL, RX_USED = 0xB000, 0xD000, 0xE000
RAM_BYTES = DATA + SIZE * BLOCK


def measure(what: str, checks: str) -> float:
    """CPU nanoseconds of one request in the loop of this process's `devices`; `checks`: none, limits or all."""
    import fcntl

    from rayos_devices.blk.backend import BlkBackend
    from rayos_devices.blk.store import RawStore
    from rayos_devices.loop import Loop
    from rayos_devices.net.backend import NetBackend
    from rayos_devices.net.port import EchoPort, SinkPort, TapPort
    from rayos_devices.virtio.memory import GuestMemory, RegionSpec

    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, RAM_BYTES)
    fcntl.fcntl(fd, F_ADD_SEALS, 0x2)
    ram = mmap.mmap(fd, RAM_BYTES)
    memory = GuestMemory()
    memory.replace([RegionSpec(0, RAM_BYTES, 0, 0)], [fd])
    loop = Loop()
    view = memory.view

    def attach(queue: int, descriptors: int, avail: int, used: int) -> None:
        backend.queues[queue].attach(
            memory,
            SIZE,
            view(descriptors, 16 * SIZE),
            view(avail, 6 + 2 * SIZE),
            view(used, 6 + 8 * SIZE),
            base=0,
            event_idx=True,
            indirect=True,
        )

    queue = 0
    is_echo = what.startswith("echo")
    backend: BlkBackend | NetBackend
    if what == "blk":
        with tempfile.NamedTemporaryFile(dir="/var/tmp") as image:
            image.write(os.urandom(IMAGE_BYTES))
            image.flush()
            backend = BlkBackend("blk", loop, RawStore(os.open(image.name, os.O_RDWR)), quota_bytes=1 << 40)
        for slot in range(SIZE // 4):
            sector = slot * 7919 % (IMAGE_BYTES // BLOCK) * 8
            struct.pack_into("<IIQ", ram, HEADERS + 16 * slot, 0, 0, sector)
            at, head = DESC + 48 * slot, 3 * slot
            struct.pack_into("<QIHH", ram, at, HEADERS + 16 * slot, 16, 1, head + 1)
            struct.pack_into("<QIHH", ram, at + 16, DATA + BLOCK * slot, BLOCK, 3, head + 2)
            struct.pack_into("<QIHH", ram, at + 32, STATUSES + slot, 1, 2, 0)
        heads = [3 * (slot % (SIZE // 4)) for slot in range(SIZE)]
        batch = SIZE // 4
    else:
        from benchmarks.net import udp_frame

        frame = udp_frame(1500 if what == "echo1500" else 64)
        port = TapPort(open_bench_tap()) if what == "tap" else EchoPort() if is_echo else SinkPort()
        limits: dict[str, Any] = {} if checks == "none" else {"rate_bytes_per_second": 100e9}
        if checks == "all":
            from benchmarks.guarded import ADDRESS, MAC, rules
            from rayos_vmm.worker.firewall import PortFirewall, Settings

            limits["judge"] = PortFirewall(MAC, fixed=[ADDRESS], settings=Settings(rules=rules()))
        backend = NetBackend("net", loop, port, **limits)
        queue = 1
        for slot in range(SIZE):
            at = DATA + 2048 * slot
            ram[at + 12 : at + 12 + len(frame)] = frame
            struct.pack_into("<QIHH", ram, DESC + 16 * slot, at, 12 + len(frame), 0, 0)
            struct.pack_into("<QIHH", ram, RX_DESC + 16 * slot, at + 2048 * SIZE, 2048, 2, 0)
        heads = list(range(SIZE))
        batch = SIZE
    struct.pack_into(f"<{SIZE}H", ram, AVAIL + 4, *heads)
    if is_echo:
        struct.pack_into(f"<{SIZE}H", ram, RX_AVAIL + 4, *heads)
        attach(0, RX_DESC, RX_AVAIL, RX_USED)
    attach(queue, DESC, AVAIL, USED)
    vring = backend.queues[queue]
    index = done = 0
    spent = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        index = (index + batch) & 0xFFFF
        struct.pack_into("<H", ram, AVAIL + 2, index)
        if is_echo:
            struct.pack_into("<H", ram, RX_AVAIL + 2, index)
        start = time.thread_time_ns()
        while backend.process(queue):
            pass
        spent += time.thread_time_ns() - start
        done += batch
    assert vring.requests == done, "the loop left requests in the ring"
    if what != "blk":
        assert backend.snapshot()["denials"] == {}, "frames were refused"
    backend.close()
    return spent / done


def open_bench_tap() -> int:
    """A tap that is up and in no bridge: the kernel takes each frame and drops it."""
    import fcntl
    import socket

    from rayos_devices.net.port import open_tap

    (fd,) = open_tap(TAP)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", TAP.encode(), 0x1))  # SIOCSIFFLAGS, IFF_UP
    return fd


def strip(folder: Path) -> None:
    """A copy of the sources without the checks, compiled."""
    shutil.copytree(
        ROOT / "devices" / "rayos_devices",
        folder / "rayos_devices",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name, there, instead in REMOVED:
        path = folder / "rayos_devices" / name
        text = path.read_text()
        assert there in text, f"{name}: {there.strip()!r} is no longer there"
        path.write_text(text.replace(there, instead))
    subprocess.run([sys.executable, "-m", "rayos_devices.build"], cwd=folder, check=True)


def ask(tree: Path, what: str, checks: str) -> float:
    command = [sys.executable, "-P", __file__, "--child", what, checks]
    clean = {key: value for key, value in os.environ.items() if key != "RAYOS_PURE"}
    done = subprocess.run(
        command, env=clean | {"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, text=True, check=True
    )
    answer = json.loads(done.stdout)
    if not answer["from"].startswith(str(tree)) or not answer["compiled"]:
        raise SystemExit(f"measured {answer} instead of the compiled {tree}")
    return float(answer["ns"])


def child() -> None:
    import rayos_devices.compiled

    print(
        json.dumps(
            {
                "ns": measure(sys.argv[2], sys.argv[3]),
                "from": rayos_devices.compiled.__file__,
                "compiled": rayos_devices.compiled.is_compiled(),
            }
        )
    )


def main() -> None:
    from benchmarks.report import publish, table

    rows = []
    with tempfile.TemporaryDirectory(prefix="rayos-bench-") as name:
        bare = Path(name)
        strip(bare)
        for what, title in WORK.items():
            if what == "tap" and os.geteuid() != 0:
                print(f"{title}: left out, a tap needs root")
                continue
            variants = [(bare, "none"), (ROOT, "limits"), *([(ROOT, "all")] if what != "blk" else [])]
            series: dict[str, list[float]] = {checks: [] for _, checks in variants}
            for _ in range(ROUNDS):
                for tree, checks in variants:
                    series[checks].append(ask(tree, what, checks))
            cheap, *dear = (statistics.median(one) for one in series.values())
            lost = [f"{1 - cheap / one:.0%}" for one in dear]
            figures = [f"{one:.0f}" for one in (cheap, *dear)]
            rows.append([title, *figures, *[""] * (3 - len(figures)), *lost, *[""] * (2 - len(lost))])
            print(*rows[-1], flush=True)
    head = ["loop", "ns without", "with limits", "and firewall", "rate lost to limits", "to all"]
    publish(
        "the cost of gate, bucket, quota, counters, latency samples; firewall and guard", table(head, rows)
    )


if __name__ == "__main__":
    child() if "--child" in sys.argv else main()

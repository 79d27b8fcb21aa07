"""What the checks cost: the compiled loops with them, and without, on a ring that is always full: `make bench-limits`.

*Without* is a copy of the sources from which gate, bucket, counters and latency samples were taken out, compiled the
same way; both are run alternately, each in a process of its own. There is no driver process and nobody sleeps, so the
share of the checks is larger here than in any use.
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

ROOT = Path(__file__).resolve().parents[1]
#: (file, what is there, what stands there without checks)
REMOVED = (
    ("blk/ring.py", " or not self.gate.allows(operation)", ""),
    ("blk/ring.py", "            self.stats.count(operation, length)\n", ""),
    (
        "blk/ring.py",
        "            self._clock = now_ns()\n            self.stats.sample(operation, self._clock - started)\n",
        "",
    ),
    ("net/ring.py", "        if not self._mask[0] >> TX_OP & 1:\n", "        if False:\n"),
    (
        "net/ring.py",
        "        if self._turn & SAMPLE_MASK == 0:\n"
        "            self._is_sampled = True\n"
        "            self._clock = now_ns()\n",
        "",
    ),
    ("net/ring.py", "        self.stats.count(operation, size)\n", "        return\n"),
)
SIZE = 256
BLOCK = 4096
IMAGE_BYTES = 4 << 20
SECONDS = 0.4
ROUNDS = 7
F_ADD_SEALS = 1033
DESC, AVAIL, USED, HEADERS, STATUSES, DATA = 0x1000, 0x4000, 0x5000, 0x8000, 0xA000, 0x10000
RAM_BYTES = DATA + SIZE * BLOCK


def measure(what: str, *, shaped: bool) -> float:
    """Nanoseconds of one request in the loop of this process's `devices`."""
    import fcntl

    from devices.blk.backend import BlkBackend
    from devices.blk.store import RawStore
    from devices.loop import Loop
    from devices.net.backend import NetBackend
    from devices.net.port import SinkPort
    from devices.virtio.memory import GuestMemory, RegionSpec

    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, RAM_BYTES)
    fcntl.fcntl(fd, F_ADD_SEALS, 0x2)
    ram = mmap.mmap(fd, RAM_BYTES)
    memory = GuestMemory()
    memory.replace([RegionSpec(0, RAM_BYTES, 0, 0)], [fd])
    loop = Loop()
    queue = 0
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
        backend = NetBackend("net", loop, SinkPort(), rate_bytes_per_second=100e9 if shaped else None)
        queue = 1
        for slot in range(SIZE):
            struct.pack_into("<QIHH", ram, DESC + 16 * slot, DATA + 2048 * slot, 12 + 64, 0, 0)
        heads = list(range(SIZE))
        batch = SIZE
    struct.pack_into(f"<{SIZE}H", ram, AVAIL + 4, *heads)
    vring = backend.queues[queue]
    view = memory.view
    vring.attach(
        memory,
        SIZE,
        view(DESC, 16 * SIZE),
        view(AVAIL, 6 + 2 * SIZE),
        view(USED, 6 + 8 * SIZE),
        base=0,
        event_idx=True,
        indirect=True,
    )
    index = done = 0
    spent = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        index = (index + batch) & 0xFFFF
        struct.pack_into("<H", ram, AVAIL + 2, index)
        start = time.perf_counter_ns()
        while backend.process(queue):
            pass
        spent += time.perf_counter_ns() - start
        done += batch
    assert vring.requests == done, "the loop left requests in the ring"
    return spent / done


def strip(folder: Path) -> None:
    """A copy of the sources without the checks, compiled."""
    shutil.copytree(ROOT / "devices", folder / "devices", ignore=shutil.ignore_patterns("__pycache__"))
    for name, there, instead in REMOVED:
        path = folder / "devices" / name
        text = path.read_text()
        assert there in text, f"{name}: {there.strip()!r} is no longer there"
        path.write_text(text.replace(there, instead))
    subprocess.run([sys.executable, "-m", "devices.build"], cwd=folder, check=True)


def ask(tree: Path, what: str, *, shaped: bool) -> float:
    command = [sys.executable, __file__, "--child", what, str(int(shaped))]
    clean = {key: value for key, value in os.environ.items() if key != "RAYOS_PURE"}
    done = subprocess.run(
        command, env=clean | {"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, text=True, check=True
    )
    answer = json.loads(done.stdout)
    if not answer["from"].startswith(str(tree)) or not answer["compiled"]:
        raise SystemExit(f"measured {answer} instead of the compiled {tree}")
    return float(answer["ns"])


def child() -> None:
    import devices.compiled

    print(
        json.dumps(
            {
                "ns": measure(sys.argv[2], shaped=bool(int(sys.argv[3]))),
                "from": devices.compiled.__file__,
                "compiled": devices.compiled.is_compiled(),
            }
        )
    )


def main() -> None:
    from benchmarks.report import publish, table

    rows = []
    with tempfile.TemporaryDirectory(prefix="rayos-bench-") as name:
        bare = Path(name)
        strip(bare)
        for what, title in (("blk", "blk 4 KiB read, page cache"), ("net", "net TX 64 B into a sink")):
            with_checks, without = [], []
            for _ in range(ROUNDS):
                with_checks.append(ask(ROOT, what, shaped=True))
                without.append(ask(bare, what, shaped=False))
            dear, cheap = statistics.median(with_checks), statistics.median(without)
            rows.append([title, f"{dear:.0f}", f"{cheap:.0f}", f"{1 - cheap / dear:.0%}"])
            print(*rows[-1], flush=True)
    head = ["loop", "ns with all checks", "ns without", "rate lost"]
    publish("the cost of gate, bucket, quota, counters and latency samples", table(head, rows))


if __name__ == "__main__":
    child() if "--child" in sys.argv else main()

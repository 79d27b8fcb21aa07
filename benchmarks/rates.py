"""How exactly a network card's rate is kept, from 1 Mbit/s to 1 Gbit/s: `make bench-limits`.

A guest that always has more to send, into a sink, for SECONDS at each rate, counted from when its burst is used up. The
limit is set on the running device, as `rayos device quota` does.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time

from benchmarks.report import publish, table
from rayos_devices.gate import Op
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.net.backend import TX, NetBackend
from rayos_devices.net.port import SinkPort
from rayos_devices.net.wire import HEADER_BYTES
from rayos_devices.virtio.memory import GuestMemory, RegionSpec

#: bit/s
RATES = (1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9)
SECONDS = 3.0
FRAME_BYTES = 1514
SIZE = 256
DESC, AVAIL, USED, DATA = 0x1000, 0x4000, 0x5000, 0x10000
RAM_BYTES = DATA + 2048 * SIZE
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 0x2
#: More than any burst: 10 ms of the rate, or one largest frame.
BURST_SECONDS, LARGEST = 0.01, 1 << 17


def guest(loop: Loop) -> tuple[NetBackend, mmap.mmap]:
    """A card with a full ring of frames, and the memory that they are in."""
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, RAM_BYTES)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    ram = mmap.mmap(fd, RAM_BYTES)
    memory = GuestMemory()
    memory.replace([RegionSpec(0, RAM_BYTES, 0, 0)], [fd])
    for slot in range(SIZE):
        size = HEADER_BYTES + FRAME_BYTES
        struct.pack_into("<QIHH", ram, DESC + 16 * slot, DATA + 2048 * slot, size, 0, 0)
    struct.pack_into(f"<{SIZE}H", ram, AVAIL + 4, *range(SIZE))
    backend = NetBackend("net", loop, SinkPort(), rate_bytes_per_second=1e6)
    parts = (memory.view(DESC, 16 * SIZE), memory.view(AVAIL, 6 + 2 * SIZE), memory.view(USED, 6 + 8 * SIZE))
    backend.queues[TX].attach(memory, SIZE, *parts, base=0, event_idx=True, indirect=True)
    return backend, ram


def shaped(rate: float) -> float:
    """The bytes a second that pass at a `rate` of so many."""
    loop = Loop()
    backend, ram = guest(loop)

    def go_on() -> None:
        backend.run_queue(TX)

    backend.change_limit(Limit.RATE, round(rate))
    vring = backend.queues[TX]
    given = before = 0
    first = 0.0
    while not first or time.monotonic() - first < SECONDS:
        if vring.requests == given:
            given += SIZE
            struct.pack_into("<H", ram, AVAIL + 2, given & 0xFFFF)
            if backend.run_queue(TX):
                loop.call_soon(go_on)
        loop.step(0.0 if vring.requests == given else 0.05)
        passed = backend.stats.account.counted(Op.NET_TX)[2]
        if not first and passed > max(BURST_SECONDS * rate, LARGEST):
            first, before = time.monotonic(), passed
    return (passed - before) / (time.monotonic() - first)


def main() -> None:
    rows = []
    for rate in RATES:
        got = 8 * shaped(rate / 8)
        rows.append([f"{rate / 1e6:g}", f"{got / 1e6:.3f}", f"{got / rate - 1:+.2%}"])
        print(*rows[-1], flush=True)
    publish("how exactly a card's rate is kept", table(["Mbit/s asked for", "Mbit/s passed", "error"], rows))


if __name__ == "__main__":
    main()

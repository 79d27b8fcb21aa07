"""A whole 1920x1080 frame through the worker, beside a plain copy of the same bytes: `make bench-gpu`.

A frame is TRANSFER_TO_HOST_2D (guest pages into the heap) and RESOURCE_FLUSH. Its time is what `process` takes; QEMU's
display socket is not in it, since pictures are sent between frames: its CPU time stands in a line of its own. The pages
of a backing are one piece, or scattered as a guest's memory is after a while (every page apart, backwards).
"""

from __future__ import annotations

import mmap
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Final

from benchmarks.report import publish, table
from rayos_devices.gpu.wire import Rect
from tests.framework.gpu import OK, GpuGuest

WIDTH, HEIGHT = 1920, 1080
FRAME: Final = WIDTH * HEIGHT * 4
PAGE: Final = mmap.PAGESIZE
ROUNDS: Final = 60


def copy_ns() -> float:
    """A copy of a frame between two shared mappings, as heap and guest memory are."""
    maps = []
    for _ in range(2):
        fd = os.memfd_create("bench")
        os.ftruncate(fd, FRAME)
        maps.append(memoryview(mmap.mmap(fd, FRAME)))
        os.close(fd)
        maps[-1][:] = bytes(FRAME)
    return _median(lambda: maps[0].__setitem__(slice(None), maps[1]))


def _median(work: Callable[[], object]) -> float:
    spent = []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        work()
        spent.append(time.perf_counter_ns() - start)
    return statistics.median(spent)


def frame_ns(entries: Callable[[int], list[tuple[int, int]]]) -> tuple[float, float]:
    """Nanoseconds in the worker for the transfer and for the flush of a frame whose backing is `entries(address)`."""
    with GpuGuest(ram_bytes=32 << 20, width=WIDTH, height=HEIGHT, quota_bytes=64 << 20) as guest:
        pages = -(-FRAME // PAGE)
        address = guest.ram.allocate(pages * PAGE, PAGE)
        guest.keep()
        whole = Rect(0, 0, WIDTH, HEIGHT)
        assert guest.create(1, WIDTH, HEIGHT) == OK
        assert guest.attach(1, entries(address)) == OK
        assert guest.set_scanout(0, 1, whole) == OK
        backend, spent = guest.backend, 0
        process = backend.process

        def timed(queue: int) -> bool:
            nonlocal spent
            start = time.perf_counter_ns()
            try:
                return process(queue)
            finally:
                spent += time.perf_counter_ns() - start

        backend.process = timed  # type: ignore[method-assign]
        transfers, flushes = [], []
        for _ in range(ROUNDS):
            spent = 0
            assert guest.transfer(1, whole) == OK
            transfers.append(spent)
            spent = 0
            assert guest.flush(1, whole) == OK
            flushes.append(spent)
        return statistics.median(transfers), statistics.median(flushes)


def send_ns() -> float:
    """CPU nanoseconds in the worker for sending a frame to a QEMU that reads as fast as it can."""
    ours, theirs = socket.socketpair()

    def drain() -> None:
        room = bytearray(1 << 20)
        while ours.recv_into(room):
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    with GpuGuest(ram_bytes=32 << 20, width=WIDTH, height=HEIGHT, quota_bytes=64 << 20) as guest:
        guest.show(1, WIDTH, HEIGHT)
        display = guest.backend.screen.display
        display.attach(theirs.detach())
        spent = []
        for _ in range(ROUNDS):
            before, start = display.sent_bytes, time.thread_time_ns()
            display.damage(0, Rect(0, 0, WIDTH, HEIGHT))
            while display.sent_bytes < before + FRAME:
                display._pump(display._socket)  # type: ignore[arg-type]
            spent.append(time.thread_time_ns() - start)
    ours.close()
    reader.join()
    return statistics.median(spent)


def main() -> None:
    pages = -(-FRAME // PAGE)
    base = copy_ns()
    rows = [["copy of the same bytes", "", "", f"{base / 1e6:.2f}", "1.00"]]
    for title, entries in (
        ("frame, backing in one piece", lambda address: [(address, FRAME)]),
        (
            "frame, every page apart",
            lambda address: [(address + page * PAGE, PAGE) for page in reversed(range(pages))],
        ),
    ):
        transfer, flush = frame_ns(entries)
        total = transfer + flush
        rows.append(
            [
                title,
                f"{transfer / 1e6:.2f}",
                f"{flush / 1e6:.2f}",
                f"{total / 1e6:.2f}",
                f"{total / base:.2f}",
            ]
        )
    sent = send_ns()
    rows.append(["to QEMU's display, CPU time", "", "", f"{sent / 1e6:.2f}", f"{sent / base:.2f}"])
    head = ["1920x1080, 8.3 MB", "transfer ms", "flush ms", "together ms", "of a copy"]
    publish("a frame through the GPU", table(head, rows))


if __name__ == "__main__":
    main()

"""A driver that writes to a real worker's disk, knows what was acknowledged, and looks at the image itself.

Every block is written with its own number and a generation; a write is acknowledged when its used entry came with
status 0. After a kill the image must hold every acknowledged block: kill -9 loses the process, not the page cache.
"""

from __future__ import annotations

import os
import random
import select
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.framework.kept import Kept, Link
from tests.framework.target import Rig

BLOCK: Final = 4096
DEPTH: Final = 16
_HEADER: Final = struct.Struct("<IIQ")
_STAMP: Final = struct.Struct("<QQ")
_OUT: Final = 1
#: A kill comes only after more acknowledged writes than these: what was not written cannot be lost.
BETWEEN_KILLS: Final = 10
#: Seconds that a request may take, over a kill and on a loaded machine.
PATIENCE: Final = 20.0


def stamp(block: int, generation: int) -> bytes:
    """A block's contents: a torn or misplaced one shows."""
    return _STAMP.pack(block, generation) * (BLOCK // _STAMP.size)


@dataclass
class Tally:
    """The totals of a run."""

    kills: int = 0
    acknowledged: int = 0
    errors: int = 0
    lost: list[int] = field(default_factory=list)


class DiskDriver:
    """Writes through the queues of `kept`'s device `disk`, at random blocks, DEPTH in flight."""

    def __init__(self, kept: Kept, image: Path, *, queues: int = 1, seed: int = 1) -> None:
        self.rig = Rig(Link(kept, "disk"), queues)
        self.tally = Tally()
        self._kept = kept
        self._image = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        self._blocks = image.stat().st_size // BLOCK
        self._random = random.Random(seed)
        self._generation = 0
        self._killed = 0
        self._held: dict[int, int] = {}
        self._unproven: set[int] = set()
        ram = self.rig.ram
        self._slots = [(ram.allocate(16), ram.allocate(BLOCK, 4096), ram.allocate(1)) for _ in range(DEPTH)]
        self._free = list(range(DEPTH))
        #: queue and head -> slot, block, generation
        self._flying: dict[tuple[int, int], tuple[int, int, int]] = {}
        self._calls = select.poll()
        for queue in self.rig.queues:
            self._calls.register(queue.call_fd, select.POLLIN)

    def write_for(self, seconds: float) -> None:
        """Keep the disk busy; returns with requests in flight."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._fill()
            self._calls.poll(10)
            self._reap()

    def settle(self) -> None:
        """Wait until everything was answered. Errors: TimeoutError."""
        deadline = time.monotonic() + PATIENCE
        while self._flying:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self._flying)} requests were never answered")
            self._calls.poll(10)
            self._reap()

    def _fill(self) -> None:
        ram = self.rig.ram
        busy = {block for _, block, _ in self._flying.values()}
        while self._free:
            block = self._random.randrange(self._blocks)
            if block in busy:
                continue
            busy.add(block)
            slot = self._free.pop()
            index = self._generation % len(self.rig.queues)
            queue = self.rig.queues[index]
            header, data, status = self._slots[slot]
            self._generation += 1
            ram.write(header, _HEADER.pack(_OUT, 0, block * BLOCK // 512))
            ram.write(data, stamp(block, self._generation))
            ram.write(status, b"\xff")
            head = queue.add([(header, 16), (data, BLOCK)], [(status, 1)])
            self._flying[index, head] = (slot, block, self._generation)
            queue.offer([head])
        for queue in self.rig.queues:
            queue.kick()

    def _reap(self) -> None:
        for index, queue in enumerate(self.rig.queues):
            queue.was_called()
            for head, _ in queue.collect():
                self._ended(*self._flying.pop((index, head)))

    def _ended(self, slot: int, block: int, generation: int) -> None:
        self._free.append(slot)
        if self.rig.ram.read(self._slots[slot][2], 1) == b"\0":
            self.tally.acknowledged += 1
            self._held[block] = generation
            self._unproven.add(block)
        else:
            self.tally.errors += 1

    def kill(self) -> None:
        """SIGKILL in the middle of it; before the successor may repair anything, the image is looked at."""
        killed = self._kept.ask("kill_worker")["worker_pid"]
        self.tally.kills += killed != self._killed  # else its successor is not there yet
        self._killed = killed
        self._reap()
        self.check()

    def check(self) -> None:
        """Compare what was acknowledged since the last look with the image."""
        flying = {block for _, block, _ in self._flying.values()}
        for block in self._unproven:
            found = os.pread(self._image, BLOCK, block * BLOCK)
            generation = _STAMP.unpack_from(found)[1]
            # A later write of this block may be done and not answered yet, or half done.
            if block in flying:
                continue
            if found != stamp(block, generation) or generation < self._held[block]:
                self.tally.lost.append(block)
        self._unproven &= flying

    def close(self) -> None:
        self.rig.close()
        os.close(self._image)


def kill_under_load(
    kept: Kept, image: Path, kills: int, *, queues: int = 1, longest_s: float = 0.03, seed: int = 1
) -> Tally:
    """`kills` kills at random moments of a busy disk, checked after each; the disk works at the end."""
    driver = DiskDriver(kept, image, queues=queues, seed=seed)
    moments = random.Random(seed)
    try:
        while driver.tally.kills < kills:
            before = driver.tally.acknowledged
            deadline = time.monotonic() + PATIENCE
            while driver.tally.acknowledged <= before + BETWEEN_KILLS:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{driver.tally.acknowledged - before} writes answered since the last kill"
                    )
                driver.write_for(moments.uniform(0.002, longest_s))
            driver.kill()
        driver.write_for(0.02)
        driver.settle()
        driver.check()
    finally:
        driver.close()
    return driver.tally

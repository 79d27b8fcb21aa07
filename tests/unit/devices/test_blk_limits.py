"""Limits of a disk: what is too much waits in its ring, and nothing is refused or lost."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayos_devices.blk.backend import BlkBackend
from rayos_devices.blk.store import RawStore
from rayos_devices.loop import Loop
from tests.framework.target import Rig, Stepped

BLOCK = 4096
BLOCKS = 64


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Stepped[BlkBackend]]:
    image = tmp_path / "image"
    image.write_bytes(bytes(BLOCK * BLOCKS))

    def make(loop: Loop) -> BlkBackend:
        return BlkBackend("blk", loop, RawStore(os.open(image, os.O_RDWR)), queues=2)

    with Stepped(make) as stepped:
        yield stepped


def write(rig: Rig, queue: int, block: int) -> None:
    request = struct.pack("<IIQ", 1, 0, block * BLOCK // 512) + bytes([block + 1]) * BLOCK
    source, status = rig.ram.put(request, 4096), rig.ram.allocate(1)
    rig.queues[queue].submit([(source, len(request))], [(status, 1)])


def keep_busy(
    target: Stepped[BlkBackend], rig: Rig, count: int, look: Callable[[], None] = lambda: None
) -> list[int]:
    """Offer what has come back again until `count` requests have; how many of each queue. `look` after every step."""
    done = [0, 0]
    while sum(done) < count:
        for queue, driver in enumerate(rig.queues):
            heads = driver.reap()
            done[queue] += len(heads)
            driver.offer(heads)
            driver.kick()
            driver.arm()
        target.loop.step(0.01)
        look()
    return done


@pytest.mark.parametrize(
    "limits", [{"operations_per_second": 0.001}, {"bytes_per_second": 0.001}], ids=["operations", "bytes"]
)
def test_what_is_too_much_waits_and_goes_when_the_limit_does(
    target: Stepped[BlkBackend], limits: dict[str, float]
) -> None:
    """One more than the burst is done (debt is paid afterwards), the rest when the limit is lifted, in order."""
    target.backend.set_limits(**limits)
    with Rig(target, 2) as rig:
        for block in range(10):
            write(rig, 0, block)
        rig.settle()
        early = rig.queues[0].collect()
        assert len(early) == (2 if "operations_per_second" in limits else 1)
        quota = target.backend.snapshot()["quota"]
        assert quota["waits"] == 1 and 0.001 in quota.values()
        target.backend.set_limits()
        late = rig.wait_used(0, 10 - len(early))
        assert len(late) + len(early) == 10
        assert target.backend.store.allocated_bytes >= 10 * BLOCK


def test_a_stopped_queue_waits_for_nothing(target: Stepped[BlkBackend]) -> None:
    """A queue that was stopped while it waited starts anew with what it had not done."""
    target.backend.set_limits(operations_per_second=0.001)
    with Rig(target, 2) as rig:
        for block in range(4):
            write(rig, 0, block)
        rig.settle()
        done = len(rig.queues[0].collect())
        base = rig.frontend.stop(0)
        assert base == done == 2
        target.backend.set_limits()
        rig.frontend.start(0, rig.queues[0], base=base)
        assert len(rig.wait_used(0, 2)) == 2


def test_two_queues_share_a_limit_fairly(target: Stepped[BlkBackend]) -> None:
    """Both always have more to do; neither gets less than a third."""
    target.backend.set_limits(operations_per_second=5000)
    with Rig(target, 2) as rig:
        for queue in (0, 1):
            for block in range(16):
                write(rig, queue, block)
        done = keep_busy(target, rig, 300)
        assert min(done) > 100, done


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_no_more_are_on_their_way_at_once_than_may_be(tmp_path: Path, at_once: int) -> None:
    """Of both queues together, whose turns are fair; all is done, and all at once when the limit is gone."""
    image = tmp_path / "image"
    image.write_bytes(bytes(BLOCK * BLOCKS))
    seen: list[int] = []

    def make(loop: Loop) -> BlkBackend:
        store = RawStore(os.open(image, os.O_RDWR), is_direct=True)  # no request is over at once
        return BlkBackend("blk", loop, store, queues=2)

    with Stepped(make) as target, Rig(target, 2) as rig:
        disk = target.backend
        disk.limit_concurrency(at_once)
        for queue in (0, 1):
            for block in range(16):
                header = rig.ram.put(struct.pack("<IIQ", 0, 0, block * BLOCK // 512))
                data, status = rig.ram.put(bytes(BLOCK), BLOCK), rig.ram.allocate(1)
                rig.queues[queue].submit([(header, 16)], [(data, BLOCK), (status, 1)])
        done = keep_busy(target, rig, 200, lambda: seen.append(disk.depth - len(disk._held_back)))
        assert max(seen) == at_once and min(done) > 60, (max(seen), done)
        quota = disk.snapshot()["quota"]
        assert quota["requests_at_once"] == at_once and quota["waits"] > 0
        disk.limit_concurrency(0)
        rig.settle()
        assert disk._held_back == []
        for queue in (0, 1):
            rig.frontend.stop(queue)

"""A worker killed under a packed ring: its successor goes on in the ring that the frontend has now, no other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayos_devices.vhost_user.message import FrontendRequest
from rayos_vmm.shared.spec import Device
from tests.framework.hostile import DEVICES, image
from tests.framework.kept import Kept, Link
from tests.framework.target import Rig

SIZE = 8


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    fd = os.open(image(tmp_path), os.O_RDWR)
    with Kept(tmp_path, [Device(kind="blk", name="blk", fd=fd, serial="hostile", packed=True)]) as kept:
        os.close(fd)
        kept.status()
        yield kept


def kill(kept: Kept) -> None:
    kept.ask("kill_worker")


@pytest.fixture
def rig(kept: Kept) -> Iterator[Rig]:
    with Rig(Link(kept, "blk"), 1, size=SIZE, packed=True) as rig:
        yield rig


def work(rig: Rig, times: int = 5) -> None:
    for _ in range(times):
        DEVICES["blk"].honest(rig)


def test_killed_at_work_and_at_rest(kept: Kept, rig: Rig) -> None:
    """It is not told a position: it has its predecessor's, wherever in the ring that was."""
    for turn in range(8):
        work(rig, turn)
        kill(kept)
        work(rig, 1)


def test_killed_between_the_stop_and_the_start_of_another_ring(kept: Kept, rig: Rig) -> None:
    """The guest was reset: the ring begins at its start, whatever the dead worker had noted."""
    for _ in range(3):
        work(rig)
        rig.frontend.stop(0)
        kill(kept)
        rig.queues[0].reset()
        rig.frontend.start(0, rig.queues[0])
        work(rig)


def test_killed_while_a_queue_rests(kept: Kept, rig: Rig) -> None:
    """The guest was paused: the ring goes on where it was stopped."""
    for _ in range(3):
        work(rig)
        base = rig.frontend.stop(0)
        assert base == rig.queues[0].device_base
        kill(kept)
        rig.frontend.start(0, rig.queues[0], base=base)
        work(rig)


def test_killed_after_a_reset_of_the_device(kept: Kept, rig: Rig) -> None:
    """RESET_DEVICE stops queues without a word of their positions."""
    for _ in range(3):
        work(rig)
        rig.frontend.tell(FrontendRequest.RESET_DEVICE)
        kill(kept)
        rig.queues[0].reset()
        rig.frontend.negotiate(rig.frontend.features, packed=True)
        rig.frontend.start(0, rig.queues[0])
        kill(kept)
        work(rig)


def test_killed_under_the_next_frontend(kept: Kept) -> None:
    """A session that ended in the middle of a ring leaves nothing to the next one."""
    for times in (3, 5):
        with Rig(Link(kept, "blk"), 1, size=SIZE, packed=True) as rig:
            work(rig, times)
        with Rig(Link(kept, "blk"), 1, size=SIZE, packed=True) as rig:
            kill(kept)
            work(rig)


def test_a_split_ring_after_a_packed_one(kept: Kept) -> None:
    """The next driver may choose otherwise, and its worker may die too."""
    for packed in (True, False, True):
        with Rig(Link(kept, "blk"), 1, packed=packed) as rig:
            work(rig)
            kill(kept)
            work(rig)

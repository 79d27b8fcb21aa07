"""A session whose driver chose packed rings: bases, areas, memory, the log of a migration."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator

import pytest

from rayos_devices.state import StateStore
from rayos_devices.vhost_user.message import VRING_STATE, FrontendRequest
from rayos_devices.virtio.features import Feature
from rayos_devices.virtio.log import DirtyLog
from rayos_devices.virtio.memory import F_SEAL_SHRINK
from tests.framework.echo import EchoBackend
from tests.framework.frontend import pack_address
from tests.framework.guest_memory import F_ADD_SEALS, GuestRam
from tests.framework.hostile import offering_packed
from tests.framework.packed_driver import PackedDriverQueue
from tests.framework.target import Rig, Stepped, attach

SIZE = 8
PAGE = 4096


@pytest.fixture
def echo() -> Iterator[Stepped[EchoBackend]]:
    with Stepped(lambda loop: offering_packed(EchoBackend(loop))) as echo:
        yield echo


@pytest.fixture
def rig(echo: Stepped[EchoBackend]) -> Iterator[Rig]:
    with Rig(echo, 2, size=SIZE, packed=True) as rig:
        yield rig


def test_packed_rings_are_offered_where_positions_outlive_the_worker() -> None:
    """Not by a device alone: its death would lose them."""
    with Stepped(EchoBackend) as plain, Rig(plain) as rig:
        assert not rig.offered & Feature.RING_PACKED
    with Stepped(lambda loop: offering_packed(EchoBackend(loop))) as packed, Rig(packed) as rig:
        assert rig.offered & Feature.RING_PACKED
        assert rig.request(b"split", 5) == b"split", "a driver may want split rings all the same"


def test_stopping_returns_both_positions_and_starting_goes_on_there(rig: Rig) -> None:
    """Bits 0 to 14 next available, 15 its wrap counter, 16 to 30 next used, 31 its wrap counter."""
    for turn in range(12):
        assert rig.request(b"ping", 4) == b"ping"
        base = rig.frontend.stop(0)
        at, wrap = 2 * (turn + 1) % SIZE, 2 * (turn + 1) // SIZE % 2 == 0
        assert base == (at | wrap << 15) * 0x10001
        rig.frontend.start(0, rig.queues[0], base=base)


def test_new_memory_under_a_live_queue_keeps_its_position(rig: Rig) -> None:
    """SET_MEM_TABLE between two requests; the other queue is where it was, too."""
    for turn in range(10):
        assert rig.request(b"ping", 4, index=turn % 2) == b"ping"
        rig.frontend.set_memory(rig.ram)


@pytest.mark.parametrize("base", [0x80008008, 0x80088000, 0x80058004, 0x00038004, 0xFFFFFFFF, 0x80007FFF])
def test_a_base_outside_the_ring_ends_the_session(echo: Stepped[EchoBackend], base: int) -> None:
    """Class P, and never a look outside the ring."""
    with Rig(echo, 1, size=SIZE, packed=True) as rig:
        rig.frontend.stop(0)
        rig.frontend.send(FrontendRequest.SET_VRING_BASE, VRING_STATE.pack(0, base))
        rig.frontend.send(FrontendRequest.SET_VRING_KICK, struct.pack("<Q", 0), [rig.queues[0].kick_fd])
        assert rig.frontend.is_dropped()


@pytest.mark.parametrize("area", ["descriptors", "avail", "used"])
@pytest.mark.parametrize("offset", [2, "end"])
def test_an_area_misaligned_or_outside_ends_the_session(
    echo: Stepped[EchoBackend], area: str, offset: int | str
) -> None:
    """Descriptors lie on 16 bytes, event suppression on 4 (2.8.10); all within memory."""
    with Rig(echo, 1, size=SIZE, packed=True) as rig:
        queue = rig.queues[0]
        setattr(queue, area, getattr(queue, area) + offset if isinstance(offset, int) else rig.ram.end)
        rig.frontend.send(FrontendRequest.SET_VRING_ADDR, pack_address(0, queue))
        assert rig.frontend.is_dropped()


def test_what_a_packed_ring_writes_is_logged() -> None:
    """Buffers before the publish, the descriptors after it, the device's event suppression when it is armed."""
    fd = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)

    def taken() -> set[int]:
        data = os.pread(fd, PAGE, 0)
        os.pwrite(fd, bytes(PAGE), 0)
        return {bit for bit in range(8 * PAGE) if data[bit >> 3] >> (bit & 7) & 1}

    with GuestRam(1 << 20) as ram:
        driver = PackedDriverQueue(ram, SIZE)
        room = ram.allocate(2 * PAGE, PAGE)
        vring, memory = attach(
            driver,
            log=DirtyLog(fd, PAGE, 0),
            used_address=driver.used,
            descriptors_address=driver.descriptors,
        )
        ring = {driver.descriptors // PAGE, driver.used // PAGE}
        assert taken() == ring
        driver.submit([], [(room + PAGE - 8, 16)])
        head = vring.take()
        assert taken() == set()
        vring.push(head, 16)
        assert taken() == {room // PAGE, room // PAGE + 1}
        vring.publish()
        assert taken() == ring
        vring.arm()
        assert taken() == ring
        vring.stop()
        memory.clear()
        driver.close()
    os.close(fd)


def test_a_state_is_true_when_its_chains_are_completed() -> None:
    """The count of completed chains is in the journal: it is what the used index is in a split ring."""
    with GuestRam(1 << 20) as ram:
        driver = PackedDriverQueue(ram, SIZE)
        vring, memory = attach(driver)
        store = StateStore(None, 16)
        for turn in range(20):
            driver.submit([], [(ram.base, 1)])
            vring.push(vring.take(), 1)
            store.save(str(turn).encode(), 0, vring.next_used_index)
            assert vring.used_index == turn and vring.next_used_index == turn + 1
            vring.publish()
            store.commit()
            successor, _ = attach(driver, journal=vring.journal, resumed=True)
            assert successor.used_index == turn + 1
            successor.stop()
            driver.collect()
        vring.stop()
        memory.clear()
        driver.close()

"""The log of a migration: every page that a device wrote, buffers and used ring, and no other."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from rayos_devices.virtio.log import DirtyLog
from rayos_devices.virtio.memory import F_SEAL_SHRINK
from tests.framework.driver import DriverQueue, used_ring_bytes
from tests.framework.guest_memory import F_ADD_SEALS, GuestRam
from tests.framework.target import attach

LOG_BYTES = 512
PAGE = 4096


@pytest.fixture
def log() -> Iterator[tuple[DirtyLog, int]]:
    fd = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    yield DirtyLog(fd, LOG_BYTES, 64), fd
    os.close(fd)


def taken(fd: int) -> set[int]:
    """The pages in the log; the log is empty afterwards, as when the frontend fetched it."""
    data = os.pread(fd, PAGE, 0)
    os.pwrite(fd, bytes(PAGE), 0)
    assert not any(data[:64]) and not any(data[64 + LOG_BYTES :])
    return {bit for bit in range(8 * LOG_BYTES) if data[64 + (bit >> 3)] >> (bit & 7) & 1}


def pages(address: int, length: int) -> set[int]:
    return set(range(address // PAGE, (address + length - 1) // PAGE + 1))


@pytest.mark.parametrize(
    ("address", "length", "expected"),
    [
        (0, 1, {0}),
        (PAGE - 1, 2, {0, 1}),
        (8 * PAGE, 3 * PAGE, {8, 9, 10}),
        (5 * PAGE, 0, set()),
        (8 * LOG_BYTES * PAGE - 1, 2, {8 * LOG_BYTES - 1}),
        ((1 << 64) - 1, 1, set()),
    ],
)
def test_the_pages_of_a_range(
    log: tuple[DirtyLog, int], address: int, length: int, expected: set[int]
) -> None:
    """Every page that it touches, as far as there are bits."""
    log[0].mark(address, length)
    assert taken(log[1]) == expected


@pytest.mark.parametrize("indirect", [False, True])
def test_what_a_queue_writes_is_logged_when_it_is_told(log: tuple[DirtyLog, int], indirect: bool) -> None:
    """The writable buffers of a completed chain before it is published, the used ring after; nothing at the take."""
    ram = GuestRam(1 << 20)
    driver = DriverQueue(ram, 16)
    vring, memory = attach(driver, log=log[0], used_address=driver.used)
    ring = pages(driver.used, used_ring_bytes(16))
    assert taken(log[1]) == ring
    source, target = ram.put(b"x" * PAGE, PAGE), ram.allocate(2 * PAGE, PAGE)
    driver.submit([(source, 100)], [(target + PAGE - 8, 16), (target + 2 * PAGE - 1, 1)], indirect=indirect)
    vring.arm()
    taken(log[1])
    head = vring.take()
    assert taken(log[1]) == set()
    vring.unpop(head)
    assert vring.take() == head
    vring.push(head, 17)
    assert taken(log[1]) == pages(target, 2 * PAGE)
    vring.publish()
    assert taken(log[1]) == ring
    assert driver.collect() == [(head, 17)]
    vring.arm()
    assert taken(log[1]) == ring
    vring.stop()
    memory.clear()
    driver.close()
    ram.close()

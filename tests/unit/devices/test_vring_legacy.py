"""Chains across regions that touch, bad chains that a driver can see, and NOTIFY_ON_EMPTY (VIRTIO 1.3, 6.3)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from rayos_devices.errors import QueueError
from rayos_devices.virtio.layout import MAX_QUEUE_SIZE, descriptor_table_bytes
from rayos_devices.virtio.memory import MAX_REGIONS, GuestMemory, RegionSpec
from rayos_devices.virtio.vring import Vring
from tests.framework.driver import DESC_F_INDIRECT, DESC_F_WRITE, DriverQueue, pack_table
from tests.framework.guest_memory import GuestRam
from tests.framework.packed_driver import PackedDriverQueue
from tests.framework.target import attach

PAGE = 4096


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(1 << 20) as ram:
        yield ram


def split(driver: DriverQueue, *cuts: int, hole: int = -1) -> Vring:
    """A vring whose memory is cut at these offsets into regions that touch; one of them may be missing."""
    ram = driver.ram
    memory = GuestMemory()
    specs = [
        RegionSpec(ram.base + start, end - start, ram.user(ram.base) + start, start)
        for start, end in pairwise((0, *cuts, ram.size))
    ]
    del specs[hole if hole >= 0 else len(specs) :]
    memory.replace(specs, [ram.fd] * len(specs))
    vring = Vring(0)
    vring.call_fd, vring.error_fd = driver.call_fd, driver.error_fd
    vring.attach(
        memory,
        driver.size,
        memory.view(driver.descriptors, descriptor_table_bytes(driver.size)),
        memory.view(driver.avail, driver.avail_bytes),
        memory.view(driver.used, driver.used_bytes),
        base=driver.start,
        packed=driver.is_packed,
        event_idx=driver.event_idx,
        indirect=True,
    )
    return vring


@pytest.mark.parametrize("kind", [DriverQueue, PackedDriverQueue])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_buffer_across_regions_that_touch_is_one_buffer(
    ram: GuestRam, kind: type[DriverQueue], indirect: bool
) -> None:
    """Guest-physical memory is contiguous there; the rings of other backends cut it, too."""
    driver = kind(ram, 16)
    seam = 512 << 10
    vring = split(driver, seam, seam + PAGE, seam + 2 * PAGE)
    start = ram.base + seam - 100
    data = bytes(index * 7 & 0xFF for index in range(300))
    ram.write(start, data)
    driver.submit([(start, 300)], [(ram.base + seam + PAGE - 50, PAGE + 100)], indirect=indirect)
    chain = vring.pop()
    assert chain is not None
    assert (chain.read(1000), chain.readable_bytes, chain.writable_bytes) == (data, 300, PAGE + 100)
    assert [len(view) for view in chain.writable] == [50, PAGE, 50]
    assert chain.write(b"x" * 5000) == PAGE + 100
    assert ram.read(ram.base + seam + PAGE - 50, PAGE + 101) == b"x" * (PAGE + 100) + b"\0"
    vring.push(chain.head, 7)
    vring.publish()
    assert [written for _, written in driver.collect()] == [7]


def test_an_indirect_table_across_regions_that_touch(ram: GuestRam) -> None:
    """Also one that is not aligned; in a hole it breaks the queue."""
    driver = DriverQueue(ram, 16)
    seam = 512 << 10
    vring = split(driver, seam)
    target = ram.allocate(64)
    for start in (seam - 16, seam - 24, seam - 33):
        table = pack_table([(target, 4, 0), (target + 8, 8, DESC_F_WRITE), (target + 16, 1, DESC_F_WRITE)])
        ram.write(ram.base + start, table)
        driver.set_descriptor(3, ram.base + start, len(table), DESC_F_INDIRECT)
        driver.offer([3])
        chain = vring.pop()
        assert chain is not None and (chain.readable_bytes, chain.writable_bytes) == (4, 9)
        vring.push(3, 0)
    driver.set_descriptor(3, ram.end - 16, 48, DESC_F_INDIRECT)
    driver.offer([3])
    with pytest.raises(QueueError, match="outside guest memory"):
        vring.pop()


def test_a_buffer_over_a_hole_breaks_its_chain_alone(ram: GuestRam) -> None:
    driver = DriverQueue(ram, 16)
    seam = 512 << 10
    vring = split(driver, seam, seam + PAGE, hole=1)
    bad = driver.submit([(ram.base + seam - 10, 20)])
    good = driver.submit([(ram.base + seam - 10, 10)])
    chain = vring.pop()
    assert chain is not None and chain.head == good
    assert vring.chain_errors == 1
    vring.push(good, 0)
    vring.publish()
    assert driver.collect() == [(bad, 0), (good, 0)]


def test_pieces_have_a_bound(ram: GuestRam) -> None:
    """The longest chain, each buffer across as many regions as there may be: refused, and the arrays hold."""
    driver = DriverQueue(ram, 16)
    seam = 512 << 10
    cuts = [seam + index for index in range(MAX_REGIONS - 1)]
    vring = split(driver, *cuts)
    across = (ram.base + seam - 1, MAX_REGIONS, 0)
    plain = (ram.base, 1, 0)
    table = ram.allocate(16 * MAX_QUEUE_SIZE)
    for lead, sound in ((31, True), (32, True), (33, False), (MAX_QUEUE_SIZE, False)):
        buffers = [across] * lead + [plain] * (MAX_QUEUE_SIZE - lead)
        ram.write(table, pack_table(buffers))
        driver.set_descriptor(0, table, 16 * MAX_QUEUE_SIZE, DESC_F_INDIRECT)
        driver.offer([0])
        errors = vring.chain_errors
        chain = vring.pop()
        assert (chain is not None, vring.chain_errors == errors) == (sound, sound), lead
        if chain is not None:
            assert chain.readable_bytes == lead * MAX_REGIONS + MAX_QUEUE_SIZE - lead
            vring.push(0, 0)


# -- bad chains that a driver can see --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DriverQueue, PackedDriverQueue])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_bad_chain_has_its_status_where_that_can_be_reached(
    ram: GuestRam, kind: type[DriverQueue], indirect: bool
) -> None:
    """The last writable byte and no other, for whoever sets `fault_status`; used length 0."""
    driver = kind(ram, 64)
    vring, _ = attach(driver)
    room = ram.put(b"\xaa" * 64)
    outside = ram.end + PAGE
    cases = {
        "reachable": ([(outside, 16)], [(room, 8), (room + 8, 4)], room + 11),
        "a bad one before it": ([(room, 16)], [(outside, 512), (room + 20, 1)], room + 20),
        "itself outside": ([(outside, 16)], [(room, 8), (ram.end - 4, 5)], 0),
        "of no bytes": ([(outside, 16)], [(room, 0)], 0),
        "not writable": ([(room, 16), (outside, 16)], [], 0),
        "around the end of everything": ([(room, 4)], [((1 << 64) - 4, 8)], 0),
        "the length of everything": ([(room, 4)], [(room, 0xFFFFFFFF)], 0),
    }
    for status in (-1, 1):
        vring.fault_status = status
        for case, (readable, writable, told) in cases.items():
            ram.write(room, b"\xaa" * 64)
            driver.submit(readable, writable, indirect=indirect)
            assert vring.pop() is None, case
            vring.publish()
            assert [written for _, written in driver.collect()] == [0]
            expected = bytearray(b"\xaa" * 64)
            if told and status >= 0:
                expected[told - room] = status
            assert ram.read(room, 64) == expected, case
    assert not driver.has_error()


# -- NOTIFY_ON_EMPTY -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DriverQueue, PackedDriverQueue])
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("feature", [False, True])
def test_a_dry_queue_calls_although_it_is_asked_not_to(
    ram: GuestRam, kind: type[DriverQueue], event_idx: bool, feature: bool
) -> None:
    """Only with the feature, only when nothing is available, and nothing is in flight either."""
    driver = kind(ram, 16, event_idx=event_idx)
    vring, _ = attach(driver, notify_on_empty=feature)
    heads = [driver.add([], [(ram.allocate(4), 4)]) for _ in range(5)]

    def serve(*, keep: int = 0) -> bool:
        chains = []
        while (chain := vring.pop()) is not None:
            chains.append(chain)
        for chain in chains[: len(chains) - keep]:
            vring.push(chain.head, 0)
        vring.publish()
        held.extend(chains[len(chains) - keep :])
        return driver.was_called()

    held: list[object] = []
    driver.offer(heads[:1])
    assert serve(), "the first call is always made"
    driver.disarm()
    driver.offer(heads[1:2])
    assert serve() == feature
    driver.offer(heads[2:4])
    assert not serve(keep=1), "one is in flight"
    chain = held.pop()
    vring.push(chain.head, 0)  # type: ignore[attr-defined]
    driver.offer(heads[4:])
    vring.publish()
    assert not driver.was_called(), "one is available"
    assert serve() == feature

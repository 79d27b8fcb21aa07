"""A second vCPU rewrites descriptors, headers and tables while the device parses them (row V9).

Two ways: the device in a process of its own, raced for real; and the interpreted vring on memory that counts every
look, since a race proves presence only.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest

from rayos_devices.virtio.layout import MAX_QUEUE_SIZE
from tests.framework.driver import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DriverQueue, pack_table
from tests.framework.guest_memory import GuestRam
from tests.framework.hostile import DEVICES, IMAGE_BYTES, SECTOR, wait_for
from tests.framework.interpreted import interpreted
from tests.framework.packed_driver import PackedDriverQueue
from tests.framework.target import Rig, Served

ROUNDS = 150


@contextmanager
def racing(rewrite: Callable[[], None]) -> Iterator[None]:
    """`rewrite` over and over, on a thread of its own."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            rewrite()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("blk")
    with DEVICES["blk"].served(directory) as served:
        yield served


def rounds(rig: Rig, heads: list[int], count: int = ROUNDS) -> Counter[int]:
    """Offer the chain `count` times, one at a time; what was written each time. A latched queue is reset."""
    queue = rig.queues[0]
    seen: Counter[int] = Counter()
    image = bytes(queue._table)
    for _ in range(count):
        before = queue.used_index
        queue.offer(heads)
        queue.kick(always=True)
        latched: list[bool] = []

        def is_over(before: int = before, latched: list[bool] = latched) -> bool:
            if queue.has_error():
                latched.append(True)
            return bool(latched) or queue.used_index != before

        assert wait_for(rig, is_over)
        if latched:
            seen[-1] += 1
            rig.restart(0)
            queue._table[:] = image
        else:
            entries = queue.collect()
            assert [head for head, _ in entries] == heads, "a head came back twice or not at all"
            seen[entries[0][1]] += 1
    return seen


def test_V9_the_data_descriptor_changes(disk: Served) -> None:
    """Between a good buffer and one that is outside memory, too long or of another direction: done or refused."""
    with Rig(disk) as rig:
        queue = rig.queues[0]
        header = rig.ram.put(struct.pack("<IIQ", 0, 0, 3))
        room, status = rig.ram.allocate(512), rig.ram.allocate(1)
        queue.set_descriptor(0, header, 16, DESC_F_NEXT, 1)
        queue.set_descriptor(2, status, 1, DESC_F_WRITE)
        good = (room, 512, DESC_F_NEXT | DESC_F_WRITE, 2)
        variants = [
            good,
            (rig.ram.end - 256, 512, DESC_F_NEXT | DESC_F_WRITE, 2),
            (room, 0xFFFFFFFF, DESC_F_NEXT | DESC_F_WRITE, 2),
            (room, 512, DESC_F_NEXT, 2),
            (room, 512, DESC_F_WRITE, 2),
        ]

        def rewrite() -> None:
            for variant in variants:
                queue.set_descriptor(1, *variant)

        queue.set_descriptor(1, *good)
        with racing(rewrite):
            seen = rounds(rig, [0])
        # 512 alone: the buffer was the last one. Torn mixtures of two variants are among these as well.
        assert set(seen) <= {-1, 0, 512, 513, 1}, seen
        queue.set_descriptor(1, *good)
        DEVICES["blk"].honest(rig)


def test_V9_an_indirect_table_changes(disk: Served) -> None:
    """Also into nesting and loops, which break the queue; nothing else comes of it."""
    with Rig(disk) as rig:
        queue = rig.queues[0]
        header = rig.ram.put(struct.pack("<IIQ", 0, 0, 3))
        room, status = rig.ram.allocate(512), rig.ram.allocate(1)
        table = rig.ram.put(
            pack_table([(header, 16, 0), (room, 512, DESC_F_WRITE), (status, 1, DESC_F_WRITE)])
        )
        variants = [
            (room, 512, DESC_F_WRITE | DESC_F_NEXT, 2),
            (table, 16, DESC_F_INDIRECT, 2),
            (room, 512, DESC_F_WRITE | DESC_F_NEXT, 1),
            (room, 512, DESC_F_WRITE | DESC_F_NEXT, 3),
            (rig.ram.end, 512, DESC_F_WRITE | DESC_F_NEXT, 2),
        ]
        entries = [struct.pack("<QIHH", *variant) for variant in variants]

        def rewrite() -> None:
            for entry in entries:
                rig.ram.write(table + 16, entry)

        # A descriptor is four fields, and only each of them is read at once. So what a race may end in is what one of
        # their mixtures ends in that nobody rewrites: 17 is the length of the second with the flags of the others.
        sound = rig.ram.read(table, 48)
        queue.set_descriptor(0, table, 48, DESC_F_INDIRECT)
        consistent = set()
        for mixture in product(*map(set, zip(*variants, strict=True))):
            rig.ram.write(table, sound)
            rig.ram.write(table + 16, struct.pack("<QIHH", *mixture))
            consistent |= set(rounds(rig, [0], 1))
        assert consistent == {-1, 0, 17, 513}
        rig.ram.write(table, sound)
        with racing(rewrite):
            seen = rounds(rig, [0])
        assert set(seen) <= consistent, seen
        DEVICES["blk"].honest(rig)


def test_V9_a_request_header_changes(disk: Served) -> None:
    """Between a read, a write of one sector or another, and one beyond the end: never a write elsewhere."""
    with Rig(disk) as rig:
        queue = rig.queues[0]
        header = rig.ram.allocate(16)
        data = rig.ram.put(b"W" * 512)
        status = rig.ram.allocate(1)
        queue.set_descriptor(0, header, 16, DESC_F_NEXT, 1)
        queue.set_descriptor(1, data, 512, DESC_F_NEXT, 2)
        queue.set_descriptor(2, status, 1, DESC_F_WRITE)
        sectors = IMAGE_BYTES // 512
        variants = [
            struct.pack("<IIQ", 1, 0, 8),
            struct.pack("<IIQ", 1, 0, 9),
            struct.pack("<IIQ", 1, 0, sectors),
            struct.pack("<IIQ", 1, 0, (1 << 64) - 1),
            struct.pack("<IIQ", 77, 0, 8),
        ]

        def rewrite() -> None:
            for variant in variants:
                rig.ram.slice(header, 16)[:] = variant

        rewrite()
        with racing(rewrite):
            seen = rounds(rig, [0])
        assert set(seen) == {1}, seen
        for sector in range(64):
            answer = rig.request(struct.pack("<IIQ", 0, 0, sector), 513)
            allowed = (SECTOR, b"W" * 512) if sector in (8, 9) else (SECTOR,)
            assert answer[:512] in allowed, f"sector {sector} was written"
        for sector in (8, 9):
            rig.request(struct.pack("<IIQ", 1, 0, sector) + SECTOR, 1)
        DEVICES["blk"].honest(rig)


def test_V9_a_packed_ring_changes(disk: Served) -> None:
    """Lengths, ids, flags and addresses all over the ring: whatever comes of it is the driver's, and its alone."""
    with Rig(disk, size=16, packed=True) as rig:
        queue = rig.queues[0]
        assert isinstance(queue, PackedDriverQueue)
        header = rig.ram.put(struct.pack("<IIQ", 0, 0, 3))
        room, status = rig.ram.allocate(512), rig.ram.allocate(1)
        words = [
            length | identifier << 32 | flags << 48
            for length, identifier, flags in product(
                (1, 16, 512, 0xFFFFFFFF),
                (0, 0xFFFF),
                (0, 1, 2, 3, 4, 0x80, 0x81, 0x83, 0x8000, 0x8001, 0x8083),
            )
        ]
        ring = queue._table.cast("Q")

        def rewrite() -> None:
            for at, word in enumerate(words):
                ring[2 * (at * 5 % 16)] = (header, room, status, rig.ram.end, 0)[at % 5]
                ring[2 * (at * 3 % 16) + 1] = word

        queue.set_descriptor(0, header, 16, DESC_F_NEXT, 1)
        queue.set_descriptor(1, room, 512, DESC_F_NEXT | DESC_F_WRITE, 2)
        queue.set_descriptor(2, status, 1, DESC_F_WRITE)
        chain = dict(queue._laid)
        for _ in range(ROUNDS // 10):
            with racing(rewrite):
                for _ in range(10):
                    queue.offer([0])
                    queue.kick(always=True)
            rig.restart(0)
            queue._laid.update(chain)
            DEVICES["blk"].honest(rig)
        ring.release()


# -- one look each ---------------------------------------------------------------------------------------------------


class Counted:
    """Guest memory that counts looks."""

    def __init__(self, view: memoryview, looks: Counter[Any], name: str) -> None:
        self.view, self.looks, self.name = view, looks, name

    def __getitem__(self, index: int) -> int:
        self.looks[self.name, index] += 1
        return int(self.view[index])

    def __setitem__(self, index: int, value: int) -> None:
        self.view[index] = value


@pytest.mark.parametrize("is_indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("length", [1, 3, 64])
def test_V9_each_field_is_read_once(is_indirect: bool, length: int) -> None:
    """Descriptor, table entry, avail entry: one look a chain each, so what was checked is what is used."""
    memory_module = interpreted("memory")
    vring_module = interpreted("vring", memory=memory_module)
    assert length <= MAX_QUEUE_SIZE
    with GuestRam(1 << 20) as ram:
        driver = DriverQueue(ram, 64)
        memory = memory_module.GuestMemory()
        memory.replace([ram.spec], [ram.fd])
        vring = vring_module.Vring(0)
        size = driver.size
        vring.attach(
            memory,
            size,
            memory.view(driver.descriptors, 16 * size),
            memory.view(driver.avail, 6 + 2 * size),
            memory.view(driver.used, 6 + 8 * size),
            base=0,
            event_idx=True,
            indirect=True,
        )
        buffers = [(ram.allocate(8), 8) for _ in range(length)]
        head = driver.add(buffers[:-1], buffers[-1:], indirect=is_indirect)
        driver.offer([head])
        looks: Counter[Any] = Counter()
        vring._desc64 = Counted(vring._desc64, looks, "descriptor 64")
        vring._desc32 = Counted(vring._desc32, looks, "descriptor 32")
        vring._desc16 = Counted(vring._desc16, looks, "descriptor 16")
        vring._avail = Counted(vring._avail, looks, "avail")
        region = memory.regions[0]
        for width in (64, 32, 16):
            setattr(region, f"ram{width}", Counted(getattr(region, f"ram{width}"), looks, f"table {width}"))
        chain = vring.pop()
        assert chain is not None
        assert chain.head == head
        assert len(chain.readable) + len(chain.writable) == length
        assert max(looks.values()) == 1, looks.most_common(3)
        # address, length, flags and next of each, the index and the entry.
        expected = 4 * length + 2 + (4 if is_indirect else 0)
        assert sum(looks.values()) == expected
        del chain
        vring.stop()
        memory.clear()
        del region, vring
        driver.close()


@pytest.mark.parametrize("length", [1, 3, 64])
def test_V9_each_half_of_a_packed_descriptor_is_read_once(length: int) -> None:
    """The flags that make it available are those that are used, and the length and the id are of the same moment."""
    memory_module = interpreted("memory")
    vring_module = interpreted("vring", memory=memory_module, packed=interpreted("packed"))
    with GuestRam(1 << 20) as ram:
        driver = PackedDriverQueue(ram, 64)
        memory = memory_module.GuestMemory()
        memory.replace([ram.spec], [ram.fd])
        vring = vring_module.Vring(0)
        areas = (driver.descriptors, 16 * 64), (driver.avail, 4), (driver.used, 4)
        views = [memory.view(*area) for area in areas]
        vring.attach(memory, 64, *views, base=driver.start, packed=True, event_idx=True, indirect=True)
        buffers = [(ram.allocate(8), 8) for _ in range(length)]
        driver.offer([driver.add(buffers[:-1], buffers[-1:])])
        looks: Counter[Any] = Counter()
        vring._ring._words = Counted(vring._ring._words, looks, "descriptor")
        chain = vring.pop()
        assert chain is not None and len(chain.readable) + len(chain.writable) == length
        assert set(looks.values()) == {1} and len(looks) == 2 * length
        del chain
        views.clear()
        vring.stop()
        memory.clear()
        del vring
        driver.close()

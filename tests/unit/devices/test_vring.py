"""The split virtqueue, device side: order, notifications, error classes (VIRTIO 1.3, 2.7)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from rayos_devices.errors import QueueError
from rayos_devices.virtio.layout import (
    MAX_QUEUE_SIZE,
    avail_ring_bytes,
    descriptor_table_bytes,
    used_ring_bytes,
)
from rayos_devices.virtio.vring import Vring
from tests.framework.driver import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DriverQueue, pack_table
from tests.framework.guest_memory import GuestRam
from tests.framework.target import attach

SIZE = 8


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(1 << 20) as ram:
        yield ram


@pytest.fixture
def driver(ram: GuestRam) -> Iterator[DriverQueue]:
    driver = DriverQueue(ram, SIZE)
    yield driver
    driver.close()


@pytest.fixture
def vring(driver: DriverQueue) -> Iterator[Vring]:
    vring, memory = attach(driver)
    yield vring
    vring.stop()
    memory.clear()


def serve(vring: Vring) -> int:
    """Pop, answer with one byte, publish until nothing is left; how many chains there were."""
    count = 0
    while (chain := vring.pop()) is not None:
        count += 1
        vring.push(chain.head, chain.write(b"!"))
    vring.publish()
    return count


def test_the_areas_have_the_sizes_of_the_specification() -> None:
    """2.7: 16 a descriptor, 6 + 2 an avail entry, 6 + 8 a used element."""
    assert descriptor_table_bytes(256) == 16 * 256
    assert avail_ring_bytes(256) == 6 + 2 * 256
    assert used_ring_bytes(256) == 6 + 8 * 256


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_chain_is_what_the_driver_laid_out(
    ram: GuestRam, driver: DriverQueue, vring: Vring, indirect: bool
) -> None:
    """Readable buffers in order, then writable ones; what is written lands in the driver's memory."""
    first, second, room = ram.put(b"first "), ram.put(b"second"), ram.allocate(4)
    more = ram.allocate(8)
    head = driver.add([(first, 6), (second, 6)], [(room, 4), (more, 8)], indirect=indirect)
    driver.offer([head])
    chain = vring.pop()
    assert chain is not None
    assert (chain.head, chain.readable_bytes, chain.writable_bytes) == (head, 12, 12)
    assert chain.read(100) == b"first second"
    assert chain.read(4, 4) == b"t se"
    assert chain.write(b"answer", 1) == 6
    vring.push(head, 7)
    assert driver.collect() == [], "nothing is visible before the publish"
    vring.publish()
    assert driver.collect() == [(head, 7)]
    assert ram.read(room, 4) + ram.read(more, 8) == b"\0answer" + bytes(5)


def test_chains_are_popped_in_avail_order_and_may_complete_in_any(driver: DriverQueue, vring: Vring) -> None:
    """2.7.8: the used ring has its own order."""
    room = driver.ram.allocate(1)
    heads = [driver.add((), [(room, 1)]) for _ in range(4)]
    driver.offer([heads[2], heads[0], heads[3], heads[1]])
    popped = [chain.head for _ in range(4) if (chain := vring.pop()) is not None]
    assert popped == [heads[2], heads[0], heads[3], heads[1]]
    assert vring.pop() is None
    for head in reversed(popped):
        vring.push(head, 1)
    vring.publish()
    assert [head for head, _ in driver.collect()] == list(reversed(popped))


@pytest.mark.parametrize("start", [0, 1, 65530, 65535])
def test_indices_wrap_at_65536(ram: GuestRam, start: int) -> None:
    """The rings' indices are free-running 16-bit numbers, the queue goes on over the edge."""
    driver = DriverQueue(ram, SIZE)
    driver._avail_index = driver._used_index = driver._kicked_index = start
    driver._avail[1] = driver._used[1] = start
    vring, memory = attach(driver, base=start)
    room = ram.allocate(1)
    for _ in range(5):
        heads = [driver.add((), [(room, 1)]) for _ in range(3)]
        driver.offer(heads)
        assert serve(vring) == 3
        assert driver.collect() == [(head, 1) for head in heads]
    assert vring.used_index == vring.next_used_index == (start + 15) & 0xFFFF
    assert vring.stop() == (start + 15) & 0xFFFF
    memory.clear()
    driver.close()


def test_a_successor_goes_on_from_the_used_index(driver: DriverQueue) -> None:
    """With no base, what was popped but not completed is handled again, once."""
    room = driver.ram.allocate(1)
    heads = [driver.add((), [(room, 1)]) for _ in range(4)]
    driver.offer(heads)
    dead, memory = attach(driver)
    for _ in range(3):
        assert dead.pop() is not None
    dead.push(heads[0], 1)
    dead.publish()
    successor, _ = attach(driver, resumed=True)
    assert serve(successor) == 3
    assert driver.collect() == [(head, 1) for head in heads]
    for vring in (dead, successor):
        vring.stop()
    memory.clear()


def test_an_unpopped_chain_comes_again(driver: DriverQueue, vring: Vring) -> None:
    """The chain popped last can be given back; several in reverse order."""
    room = driver.ram.allocate(1)
    heads = [driver.add((), [(room, 1)]) for _ in range(2)]
    driver.offer(heads)
    first, second = vring.pop(), vring.pop()
    assert first is not None and second is not None
    for chain in (second, first):
        vring.unpop(chain.head)
    assert serve(vring) == 2
    assert driver.collect() == [(head, 1) for head in heads]


def test_stop_returns_the_avail_index_and_lets_go_of_memory(driver: DriverQueue, vring: Vring) -> None:
    """GET_VRING_BASE: where a successor starts; nothing is popped afterwards."""
    room = driver.ram.allocate(1)
    for _ in range(3):
        driver.offer([driver.add((), [(room, 1)])])
    serve(vring)
    assert vring.stop() == 3
    assert vring.stop() == 3
    assert not vring.attached
    assert vring.pop() is None
    assert not vring.arm()


# -- notifications ---------------------------------------------------------------------------------------------------


def test_the_first_publish_always_calls(driver: DriverQueue, vring: Vring) -> None:
    """Whatever used_event holds: a driver that never set it must not wait for ever."""
    driver.disarm()
    driver.offer([driver.add((), [(driver.ram.allocate(1), 1)])])
    serve(vring)
    assert driver.was_called()


def test_with_event_idx_only_the_asked_for_entry_calls(driver: DriverQueue, vring: Vring) -> None:
    """2.7.7.2: notify when the published range crosses used_event."""
    room = driver.ram.allocate(1)
    driver.offer([driver.add((), [(room, 1)])])
    serve(vring)
    driver.collect()
    driver.was_called()
    driver.arm(ahead=2)
    calls = []
    for _ in range(4):
        driver.offer([driver.add((), [(room, 1)])])
        serve(vring)
        calls.append(driver.was_called())
    assert calls == [False, False, True, False]
    assert vring.calls == 2


def test_without_event_idx_the_flag_decides(ram: GuestRam) -> None:
    """2.7.7: VIRTQ_AVAIL_F_NO_INTERRUPT."""
    driver = DriverQueue(ram, SIZE, event_idx=False)
    vring, memory = attach(driver)
    room = ram.allocate(1)
    calls = []
    for want in (True, False, True):
        if want:
            driver.arm()
        else:
            driver.disarm()
        driver.offer([driver.add((), [(room, 1)])])
        serve(vring)
        calls.append(driver.was_called())
    assert calls == [True, False, True]
    vring.stop()
    memory.clear()
    driver.close()


def test_publish_without_news_does_nothing(driver: DriverQueue, vring: Vring) -> None:
    """An idle device does not wake its driver."""
    vring.publish()
    assert not driver.was_called()
    assert vring.calls == 0


def test_arm_asks_for_the_next_kick_and_sees_what_came_meanwhile(driver: DriverQueue, vring: Vring) -> None:
    """The race between the last pop and the arming is closed by looking again."""
    room = driver.ram.allocate(1)
    assert not vring.arm()
    driver.offer([driver.add((), [(room, 1)])])
    assert driver.needs_kick()
    driver.kick()
    assert vring.arm(), "a chain waits already"
    serve(vring)
    driver.offer([driver.add((), [(room, 1)])])
    driver.kick()
    driver.offer([driver.add((), [(room, 1)])])
    assert not driver.needs_kick(), "asked for one kick only"


def test_a_full_call_eventfd_does_not_block(driver: DriverQueue, vring: Vring) -> None:
    """A driver that never reads its eventfd has a wake-up coming anyway."""
    os.eventfd_write(driver.call_fd, (1 << 64) - 2)
    vring.call()
    assert vring.calls == 1


# -- class C: the chain comes back unused, the queue goes on ---------------------------------------------------------


def bad_chains(ram: GuestRam) -> dict[str, list[tuple[int, int, int]]]:
    """Buffers (address, length, flags) that break their chain but not the queue."""
    inside = ram.base
    return {
        "in a hole": [(0x10, 16, 0)],
        "across the region's end": [(ram.end - 8, 16, 0)],
        "behind the region": [(ram.end, 1, DESC_F_WRITE)],
        "wraps 2^64": [((1 << 64) - 8, 16, 0)],
        "address plus length is 2^64": [((1 << 64) - 16, 16, 0)],
        "no bytes at a bad address": [(0x10, 0, 0)],
        "4 GiB minus 1": [(inside, 0xFFFFFFFF, DESC_F_WRITE)],
        "readable behind writable": [(inside, 1, DESC_F_WRITE), (inside, 1, 0)],
        "bad in the middle": [(inside, 1, 0), (ram.end, 1, 0), (inside, 1, DESC_F_WRITE)],
    }


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize(
    "case",
    [
        "in a hole",
        "across the region's end",
        "behind the region",
        "wraps 2^64",
        "address plus length is 2^64",
        "no bytes at a bad address",
        "4 GiB minus 1",
        "readable behind writable",
        "bad in the middle",
    ],
)
def test_a_bad_chain_comes_back_unused(
    ram: GuestRam, driver: DriverQueue, vring: Vring, case: str, indirect: bool
) -> None:
    """Class C: used(head, 0), counted, and the next chain is served."""
    buffers = bad_chains(ram)[case]
    table = pack_table(buffers)
    if indirect:
        driver.set_descriptor(0, ram.put(table), len(table), DESC_F_INDIRECT)
    else:
        ram.write(driver.descriptors, table)
    sound = 7
    driver.set_descriptor(sound, ram.allocate(1), 1, DESC_F_WRITE)
    driver.offer([0, sound])
    assert serve(vring) == 1
    assert driver.collect() == [(0, 0), (sound, 1)]
    assert vring.chain_errors == 1
    assert vring.broken == ""
    assert not driver.has_error()


# -- class Q: latched until stop -------------------------------------------------------------------------------------


def break_avail_jump(driver: DriverQueue) -> None:
    driver.set_avail_index(SIZE + 1)


def break_avail_back(driver: DriverQueue) -> None:
    driver.set_avail_index(-1)


def break_head(driver: DriverQueue) -> None:
    driver.offer([SIZE])


def break_next(driver: DriverQueue) -> None:
    driver.set_descriptor(0, driver.ram.base, 1, DESC_F_NEXT, SIZE)
    driver.offer([0])


def break_self_loop(driver: DriverQueue) -> None:
    driver.set_descriptor(0, driver.ram.base, 1, DESC_F_NEXT, 0)
    driver.offer([0])


def break_two_cycle(driver: DriverQueue) -> None:
    driver.set_descriptor(0, driver.ram.base, 1, DESC_F_NEXT, 1)
    driver.set_descriptor(1, driver.ram.base, 1, DESC_F_NEXT, 0)
    driver.offer([0])


def break_whole_cycle(driver: DriverQueue) -> None:
    for index in range(SIZE):
        driver.set_descriptor(index, driver.ram.base, 1, DESC_F_NEXT, (index + 1) % SIZE)
    driver.offer([3])


def indirect(
    driver: DriverQueue, table: bytes, length: int | None = None, flags: int = DESC_F_INDIRECT
) -> None:
    driver.set_descriptor(0, driver.ram.put(table), len(table) if length is None else length, flags, 1)
    driver.offer([0])


def break_nested(driver: DriverQueue) -> None:
    indirect(driver, struct.pack("<QIHH", driver.ram.base, 16, DESC_F_INDIRECT, 0))


def break_indirect_next(driver: DriverQueue) -> None:
    indirect(driver, pack_table([(driver.ram.base, 1, 0)]), flags=DESC_F_INDIRECT | DESC_F_NEXT)


def break_indirect_empty(driver: DriverQueue) -> None:
    indirect(driver, bytes(16), 0)


def break_indirect_odd(driver: DriverQueue) -> None:
    indirect(driver, bytes(48), 40)


def break_indirect_large(driver: DriverQueue) -> None:
    indirect(driver, bytes(16), 16 * (MAX_QUEUE_SIZE + 1))


def break_indirect_outside(driver: DriverQueue) -> None:
    driver.set_descriptor(0, driver.ram.end, 16, DESC_F_INDIRECT)
    driver.offer([0])


def break_indirect_across(driver: DriverQueue) -> None:
    driver.set_descriptor(0, driver.ram.end - 16, 32, DESC_F_INDIRECT)
    driver.offer([0])


def break_indirect_loop(driver: DriverQueue) -> None:
    indirect(driver, struct.pack("<QIHH", driver.ram.base, 1, DESC_F_NEXT, 0) * 2)


def break_indirect_next_outside(driver: DriverQueue) -> None:
    indirect(driver, struct.pack("<QIHH", driver.ram.base, 1, DESC_F_NEXT, 2) * 2)


def break_indirect_behind_direct(driver: DriverQueue) -> None:
    table = driver.ram.put(pack_table([(driver.ram.base, 1, 0)]))
    driver.set_descriptor(0, driver.ram.base, 1, DESC_F_NEXT, 1)
    driver.set_descriptor(1, table, 16, DESC_F_INDIRECT)
    driver.offer([0])


def break_twice_offered(driver: DriverQueue) -> None:
    driver.set_descriptor(0, driver.ram.base, 1, DESC_F_WRITE)
    driver.offer([0, 0])


BREAKS = [value for name, value in sorted(globals().items()) if name.startswith("break_")]


@pytest.mark.parametrize("attack", BREAKS, ids=lambda attack: attack.__name__.removeprefix("break_"))
def test_a_broken_queue_is_latched_until_it_is_stopped(driver: DriverQueue, attack: object) -> None:
    """Class Q: one error, the error eventfd, nothing parsed any more; after stop and attach it works."""
    assert callable(attack)
    vring, memory = attach(driver)
    attack(driver)
    held = []
    with pytest.raises(QueueError) as caught:
        while (chain := vring.pop()) is not None:
            held.append(chain)
    assert vring.broken == str(caught.value) != ""
    assert driver.has_error()
    driver.set_avail_index(vring.size)
    for _ in range(3):
        assert vring.pop() is None
        assert not vring.arm()
    assert not driver.has_error(), "told once"
    vring.stop()
    assert vring.broken == ""
    driver.reset()
    again, _ = attach(driver)
    driver.offer([driver.add((), [(driver.ram.allocate(1), 1)])])
    assert serve(again) == 1
    for ring in (vring, again):
        ring.stop()
    memory.clear()


def test_indirect_needs_its_feature(driver: DriverQueue) -> None:
    """An indirect descriptor that was not negotiated breaks the queue."""
    vring, memory = attach(driver, indirect=False)
    driver.offer([driver.add((), [(driver.ram.base, 1)], indirect=True)])
    with pytest.raises(QueueError, match="feature"):
        vring.pop()
    vring.stop()
    memory.clear()


def test_an_indirect_table_may_be_longer_than_the_queue(driver: DriverQueue, vring: Vring) -> None:
    """Linux does that (SEG_MAX + 2 buffers on a short queue), so it is allowed up to the longest queue."""
    buffers = [(driver.ram.base, 1)] * MAX_QUEUE_SIZE
    driver.offer([driver.add(buffers, indirect=True)])
    chain = vring.pop()
    assert chain is not None and chain.readable_bytes == MAX_QUEUE_SIZE


@pytest.mark.parametrize("shift", range(16))
def test_an_indirect_table_may_lie_at_any_address(
    ram: GuestRam, driver: DriverQueue, vring: Vring, shift: int
) -> None:
    """2.7.5.3 asks for no alignment; it is looked at once, wherever it lies, also at the region's very end."""
    source, room = ram.put(b"odd"), ram.allocate(8)
    table = pack_table([(source, 3, 0), (room, 8, DESC_F_WRITE)])
    for address in (ram.allocate(64) + shift, ram.end - len(table) - shift):
        ram.write(address, table)
        driver.set_descriptor(0, address, len(table), DESC_F_INDIRECT)
        driver.offer([0])
        chain = vring.pop()
        assert chain is not None
        assert chain.read(8) == b"odd"
        vring.push(0, chain.write(b"answered"))
        vring.publish()
        assert driver.collect() == [(0, 8)]
        assert ram.read(room, 8) == b"answered"


def test_the_longest_direct_chain_takes_every_descriptor(driver: DriverQueue, vring: Vring) -> None:
    """A chain of exactly the queue's size is no loop."""
    driver.offer([driver.add([(driver.ram.base, 1)] * SIZE)])
    chain = vring.pop()
    assert chain is not None and chain.readable_bytes == SIZE


def test_chains_offered_before_the_break_are_served(driver: DriverQueue, vring: Vring) -> None:
    """Only the bad head and what comes after it is lost."""
    good = driver.add((), [(driver.ram.base, 1)])
    driver.offer([good, SIZE + 3])
    chain = vring.pop()
    assert chain is not None
    with pytest.raises(QueueError):
        vring.pop()
    vring.push(chain.head, 1)
    vring.publish()
    assert driver.collect() == [(good, 1)]

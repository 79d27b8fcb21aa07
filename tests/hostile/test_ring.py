"""Rings and chains of a hostile driver, on every device (rows V1 to V8, V10 to V15 of the threat model).

An attack is a function named after its row. It leaves descriptors below 64 to honest requests.
"""

from __future__ import annotations

import os
import struct

import pytest
from _pytest.mark import ParameterSet

from rayos_devices.backend import Backend
from rayos_devices.vhost_user.message import FrontendRequest
from rayos_devices.virtio.features import Feature
from tests.framework.driver import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DriverQueue,
)
from tests.framework.echo import EchoBackend
from tests.framework.frontend import pack_address
from tests.framework.hostile import DEVICES, Attack, Class, Device, judge, offering_packed, wait_for
from tests.framework.packed_driver import DESC_F_AVAIL, DESC_F_USED, PackedDriverQueue
from tests.framework.target import Rig, Served, Stepped

OVER_PROCESS = [device for device in DEVICES.values() if device.name != "echo"]
LAST = 255
FREE = 200


def raw(rig: Rig, queue: DriverQueue, *descriptors: tuple[int, int, int, int], head: int = FREE) -> list[int]:
    """Write descriptors from FREE on as (address, length, flags, next), offer `head`, kick."""
    for position, (address, length, flags, following) in enumerate(descriptors):
        queue.set_descriptor(FREE + position, address, length, flags, following)
    queue.offer([head])
    queue.kick(always=True)
    return [head]


def indirect(
    rig: Rig, queue: DriverQueue, table: bytes, length: int | None = None, flags: int = 0
) -> list[int]:
    address = rig.ram.put(table)
    return raw(
        rig, queue, (address, len(table) if length is None else length, DESC_F_INDIRECT | flags, FREE + 1)
    )


# -- V1 to V4: the queue is broken -----------------------------------------------------------------------------------


def V1_self_loop(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.base, 1, DESC_F_NEXT, FREE))


def V1_two_cycle(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.base, 1, DESC_F_NEXT, FREE + 1), (rig.ram.base, 1, DESC_F_NEXT, FREE))


def V1_cycle_of_all(rig: Rig, queue: DriverQueue) -> list[int]:
    for index in range(queue.size):
        queue.set_descriptor(index, rig.ram.base, 1, DESC_F_NEXT, (index + 1) % queue.size)
    return raw(rig, queue)


def V1_cycle_behind_a_start(rig: Rig, queue: DriverQueue) -> list[int]:
    entry = (rig.ram.base, 1, DESC_F_NEXT)
    return raw(rig, queue, (*entry, FREE + 1), (*entry, FREE + 2), (*entry, FREE + 1))


def V1_loop_of_empty_buffers(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.base, 0, DESC_F_NEXT, FREE))


def V1_loop_of_writable_buffers(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.base, 1, DESC_F_NEXT | DESC_F_WRITE, FREE))


def V1_loop_outside_memory(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.end, 1, DESC_F_NEXT, FREE))


def V2_next_is_the_size(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.base, 1, DESC_F_NEXT, queue.size))


def V2_next_is_65535(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.base, 1, DESC_F_NEXT, 0xFFFF))


def V2_head_is_the_size(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, head=queue.size)


def V2_head_is_65535(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, head=0xFFFF)


def V3_avail_jumps_by_more_than_the_size(rig: Rig, queue: DriverQueue) -> None:
    queue.set_avail_index(queue.avail_index + queue.size + 1)
    queue.kick(always=True)


def V3_avail_jumps_by_half_the_range(rig: Rig, queue: DriverQueue) -> None:
    queue.set_avail_index(queue.avail_index + 0x8000)
    queue.kick(always=True)


def V3_avail_moves_back(rig: Rig, queue: DriverQueue) -> None:
    queue.set_avail_index(queue.avail_index - 1)
    queue.kick(always=True)


# -- V5, V6, V8: the chain is bad ------------------------------------------------------------------------------------


def V5_in_a_hole(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (0x10, 16, 0, 0))


def V5_behind_memory(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.end, 16, DESC_F_WRITE, 0))


def V5_across_the_end(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.end - 8, 9, 0, 0))


def V5_wraps(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, ((1 << 64) - 8, 16, 0, 0))


def V5_ends_at_2_to_the_64(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, ((1 << 64) - 16, 16, DESC_F_WRITE, 0))


def V5_wraps_into_memory(rig: Rig, queue: DriverQueue) -> list[int]:
    start = (1 << 64) - 0xFFFF_0000
    return raw(rig, queue, (start, 0xFFFF_0000 + rig.ram.base - 0x10_0000 + 64 & 0xFFFFFFFF, 0, 0))


def V5_user_address_for_a_guest_address(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.user(rig.ram.base), 16, DESC_F_WRITE, 0))


def V5_no_bytes_at_a_bad_address(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (0x10, 0, 0, 0))


def V5_bad_behind_good(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.base, 16, DESC_F_NEXT, FREE + 1), (rig.ram.end, 16, DESC_F_WRITE, 0))


def V5_bad_in_an_indirect_table(rig: Rig, queue: DriverQueue) -> list[int]:
    return indirect(rig, queue, queue.pack_table([(rig.ram.base, 16, 0), (0x10, 16, DESC_F_WRITE)]))


def V6_longest_length(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.base, 0xFFFFFFFF, DESC_F_WRITE, 0))


def V6_longest_length_many_times(rig: Rig, queue: DriverQueue) -> list[int]:
    return indirect(rig, queue, queue.pack_table([(rig.ram.base, 0xFFFFFFFF, 0)] * 1024))


def V6_sum_above_4_gib(rig: Rig, queue: DriverQueue) -> list[int]:
    """1024 times the whole of 4 MiB."""
    return indirect(rig, queue, queue.pack_table([(rig.ram.base, rig.ram.size, DESC_F_WRITE)] * 1024))


def V8_readable_behind_writable(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.base, 1, DESC_F_NEXT | DESC_F_WRITE, FREE + 1), (rig.ram.base, 16, 0, 0))


def V8_writable_in_the_middle(rig: Rig, queue: DriverQueue) -> list[int]:
    table = [(rig.ram.base, 8, 0), (rig.ram.base, 8, DESC_F_WRITE), (rig.ram.base, 8, 0)]
    return indirect(rig, queue, queue.pack_table(table))


# -- V7: indirect tables ---------------------------------------------------------------------------------------------


def V7_nested(rig: Rig, queue: DriverQueue) -> list[int]:
    inner = rig.ram.put(queue.pack_table([(rig.ram.base, 1, 0)]))
    return indirect(rig, queue, queue.pack_table([(inner, 16, DESC_F_INDIRECT)]))


def V7_nested_in_itself(rig: Rig, queue: DriverQueue) -> list[int]:
    table = rig.ram.allocate(16)
    rig.ram.write(table, queue.pack_table([(table, 16, DESC_F_INDIRECT)]))
    return raw(rig, queue, (table, 16, DESC_F_INDIRECT, 0))


def V7_with_next(rig: Rig, queue: DriverQueue) -> list[int]:
    return indirect(rig, queue, queue.pack_table([(rig.ram.base, 1, 0)]), flags=DESC_F_NEXT)


def V7_behind_a_direct_one(rig: Rig, queue: DriverQueue) -> list[int]:
    table = rig.ram.put(queue.pack_table([(rig.ram.base, 1, 0)]))
    return raw(rig, queue, (rig.ram.base, 1, DESC_F_NEXT, FREE + 1), (table, 16, DESC_F_INDIRECT, 0))


def V7_empty(rig: Rig, queue: DriverQueue) -> list[int]:
    return indirect(rig, queue, bytes(16), 0)


def V7_no_multiple_of_16(rig: Rig, queue: DriverQueue) -> list[int]:
    return indirect(rig, queue, bytes(64), 63)


def V7_longer_than_any_queue(rig: Rig, queue: DriverQueue) -> list[int]:
    return indirect(rig, queue, queue.pack_table([(rig.ram.base, 1, 0)] * 1025))


def V7_longest_length(rig: Rig, queue: DriverQueue) -> list[int]:
    return indirect(rig, queue, bytes(16), 0xFFFFFFF0)


def V7_outside_memory(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.end, 16, DESC_F_INDIRECT, 0))


def V7_across_the_end(rig: Rig, queue: DriverQueue) -> list[int]:
    return raw(rig, queue, (rig.ram.end - 16, 32, DESC_F_INDIRECT, 0))


def V7_loop_inside(rig: Rig, queue: DriverQueue) -> list[int]:
    return indirect(rig, queue, struct.pack("<QIHH", rig.ram.base, 1, DESC_F_NEXT, 0) * 4)


def V7_next_outside_the_table(rig: Rig, queue: DriverQueue) -> list[int]:
    return indirect(rig, queue, struct.pack("<QIHH", rig.ram.base, 1, DESC_F_NEXT, 4) * 4)


BROKEN: list[Attack] = [
    V1_self_loop,
    V1_two_cycle,
    V1_cycle_of_all,
    V1_cycle_behind_a_start,
    V1_loop_of_empty_buffers,
    V1_loop_of_writable_buffers,
    V1_loop_outside_memory,
    V2_next_is_the_size,
    V2_next_is_65535,
    V2_head_is_the_size,
    V2_head_is_65535,
    V3_avail_jumps_by_more_than_the_size,
    V3_avail_jumps_by_half_the_range,
    V3_avail_moves_back,
    V7_nested,
    V7_nested_in_itself,
    V7_with_next,
    V7_behind_a_direct_one,
    V7_empty,
    V7_no_multiple_of_16,
    V7_longer_than_any_queue,
    V7_longest_length,
    V7_outside_memory,
    V7_across_the_end,
    V7_loop_inside,
    V7_next_outside_the_table,
]

BAD: list[Attack] = [
    V5_in_a_hole,
    V5_behind_memory,
    V5_across_the_end,
    V5_wraps,
    V5_ends_at_2_to_the_64,
    V5_wraps_into_memory,
    V5_user_address_for_a_guest_address,
    V5_no_bytes_at_a_bad_address,
    V5_bad_behind_good,
    V5_bad_in_an_indirect_table,
    V6_longest_length,
    V6_longest_length_many_times,
    V6_sum_above_4_gib,
    V8_readable_behind_writable,
    V8_writable_in_the_middle,
]


#: In a packed ring a chain lies in a row: there is no index to be wrong, and a loop is a ring full of NEXT.
SPLIT_ONLY = (
    V2_next_is_the_size,
    V2_next_is_65535,
    V2_head_is_the_size,
    V2_head_is_65535,
    V3_avail_jumps_by_more_than_the_size,
    V3_avail_jumps_by_half_the_range,
    V3_avail_moves_back,
    V7_loop_inside,
    V7_next_outside_the_table,
)


def name(value: object) -> str:
    return str(getattr(value, "name", None) or getattr(value, "__name__", value))


def places() -> list[tuple[Device, str]]:
    return [(device, "stepped") for device in DEVICES.values()] + [
        (device, "served") for device in OVER_PROCESS
    ]


def both_rings(attacks: list[Attack]) -> list[ParameterSet]:
    """Attack and whether it is on a packed ring."""
    rings = [pytest.param(attack, False, id=name(attack)) for attack in attacks]
    return rings + [
        pytest.param(attack, True, id=f"{name(attack)}-packed")
        for attack in attacks
        if attack not in SPLIT_ONLY
    ]


PACKED = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@pytest.mark.parametrize(("device", "where"), places(), ids=name)
@pytest.mark.parametrize(("attack", "packed"), both_rings(BROKEN))
def test_a_broken_ring_is_latched_until_reset(
    device: Device, target: Stepped[Backend] | Served, attack: Attack, packed: bool
) -> None:
    """Class Q: error eventfd, nothing parsed any more, usable after a reset of the queue."""
    judge(device, target, Class.QUEUE, attack, packed=packed)


@pytest.mark.parametrize(("device", "where"), places(), ids=name)
@pytest.mark.parametrize(("attack", "packed"), both_rings(BAD))
def test_a_bad_chain_comes_back_unused(
    device: Device, target: Stepped[Backend] | Served, attack: Attack, packed: bool
) -> None:
    """Class C: used(head, 0), and the queue goes on."""
    judge(device, target, Class.CHAIN, attack, packed=packed)


# -- V4 --------------------------------------------------------------------------------------------------------------


def slow_echo() -> Stepped[EchoBackend]:
    return Stepped(lambda loop: offering_packed(EchoBackend(loop, is_slow=True)))


def test_V4_a_packed_ring_that_is_overtaken_breaks_the_queue() -> None:
    """The driver goes around and marks for the next round what the device has in hand."""
    with slow_echo() as slow, Rig(slow, 1, size=8, packed=True) as rig:
        queue = rig.queues[0]
        assert isinstance(queue, PackedDriverQueue)
        queue.set_descriptor(FREE, rig.ram.base, 4, DESC_F_WRITE)
        queue.offer([FREE] * 8)
        queue.kick(always=True)
        rig.settle()
        queue.offer([FREE])
        queue.kick(always=True)
        assert wait_for(rig, queue.has_error)
        assert "in flight" in slow.backend.queues[0].broken


@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V3_flags_of_another_round_are_nothing(device: Device, target: Stepped[Backend] | Served) -> None:
    """Descriptors that look used, or available in the round before or after: the device waits for its own."""
    with Rig(target, device.queues, packed=True) as rig:
        queue = rig.queues[device.queue]
        assert isinstance(queue, PackedDriverQueue)
        for turn in range(3):
            at, wrap = queue.offered
            for bits in (DESC_F_AVAIL | DESC_F_USED, 0, DESC_F_USED if wrap else DESC_F_AVAIL):
                for ahead in range(8):
                    queue.set_element(at + ahead, rig.ram.end, 1 << 31, 0xFFFF, bits | DESC_F_NEXT)
                queue.kick(always=True)
                rig.settle()
                assert not queue.has_error()
            for ahead in range(8):
                queue.set_element(at + ahead, 0, 0, 0, 0 if wrap else DESC_F_AVAIL | DESC_F_USED)
            for _ in range(60 + turn):
                device.honest(rig)


@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V2_an_id_is_the_drivers(device: Device, target: Stepped[Backend] | Served) -> None:
    """Any u16, also twice: it comes back, and nothing is looked up by it."""
    with Rig(target, device.queues, packed=True) as rig:
        queue = rig.queues[device.queue]
        assert isinstance(queue, PackedDriverQueue)
        ids = [0xFFFF, 0x8000, 300, 300, 0]
        for identifier in ids:
            queue.write([(rig.ram.end, 16, 0, 0)], identifier)
        queue.kick(always=True)
        assert rig.wait_used(device.queue, len(ids)) == [(identifier, 0) for identifier in ids]
        device.honest(rig)


@pytest.mark.parametrize(("device", "where"), places(), ids=name)
@pytest.mark.parametrize("event", [0x20000, 0x2FFFF, 0x28000, 0x207FF, 0x30000, 0xFFFFFFFF])
def test_V13_a_packed_event_of_any_value(
    device: Device, target: Stepped[Backend] | Served, event: int
) -> None:
    """Offsets beyond the ring and reserved flags decide on calls alone."""
    with Rig(target, device.queues, packed=True) as rig:
        queue = rig.queues[device.queue]
        for turn in range(20):
            rig.ram.write(queue.avail, event.to_bytes(4, "little"))
            raw(rig, queue, (rig.ram.end, 1, 0, 0))
            assert wait_for(rig, lambda turn=turn: queue.used_index == turn + 1)  # type: ignore[misc]
        queue.collect()
        device.honest(rig)


def test_V4_a_head_offered_again_in_flight_breaks_the_queue() -> None:
    """A device that has the chain in hand sees that it is offered again."""
    with slow_echo() as slow, Rig(slow, 1) as rig:
        queue = rig.queues[0]
        head = queue.submit((), [(rig.ram.base, 4)])
        rig.settle()
        queue.offer([head])
        queue.kick(always=True)
        assert wait_for(rig, queue.has_error)
        assert "in flight" in slow.backend.queues[0].broken
        slow.backend.complete()
        assert queue.collect() == [(head, 0)], "the first offer is served, once"


@PACKED
@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V4_a_head_offered_many_times_is_served_once_each_or_breaks(
    device: Device, target: Stepped[Backend] | Served, packed: bool
) -> None:
    """A device that finished the first before it looked at the second cannot tell: an entry per offer, never more."""
    with Rig(target, device.queues, packed=packed) as rig:
        queue = rig.queues[device.queue]
        queue.set_descriptor(FREE, rig.ram.allocate(64), 16, 0, 0)
        queue.offer([FREE] * 50)
        queue.kick(always=True)
        assert wait_for(rig, lambda: queue.used_index == 50 or queue.has_error())
        assert queue.used_index <= 50
        rig.restart(device.queue)
        device.honest(rig)


# -- V10 -------------------------------------------------------------------------------------------------------------


@PACKED
@pytest.mark.parametrize("device", [DEVICES["blk"]], ids=name)
def test_V10_a_header_in_single_bytes_is_a_header(
    target: Stepped[Backend] | Served, device: Device, packed: bool
) -> None:
    """Framing is the driver's (2.7.4.2): a request in 1-byte buffers is served as any other."""
    with Rig(target, device.queues, packed=packed) as rig:
        header = rig.ram.put(struct.pack("<IIQ", 0, 0, 3))
        room = rig.ram.allocate(513)
        rig.queues[0].submit(
            [(header + i, 1) for i in range(16)],
            [(room, 100), (room + 100, 1), (room + 101, 411), (room + 512, 1)],
            indirect=True,
        )
        assert rig.wait_used()[0][1] == 513
        assert rig.ram.read(room + 512, 1) == b"\0"
        device.honest(rig)


# -- V11: areas that overlap -----------------------------------------------------------------------------------------


def overlap_avail_used(queue: DriverQueue) -> None:
    queue.used = queue.avail + (-queue.avail) % 4


def overlap_table_used(queue: DriverQueue) -> None:
    queue.used = queue.descriptors


def overlap_all(queue: DriverQueue) -> None:
    queue.used = queue.avail = queue.descriptors


@pytest.mark.parametrize(("device", "where"), places(), ids=name)
@pytest.mark.parametrize("overlap", [overlap_avail_used, overlap_table_used, overlap_all], ids=name)
def test_V11_rings_on_top_of_each_other_hurt_their_guest_alone(
    device: Device, target: Stepped[Backend] | Served, overlap: object
) -> None:
    """Whatever the device makes of it: it is alive, and right again after a reset."""
    assert callable(overlap)
    with Rig(target, device.queues) as rig:
        queue = rig.queues[device.queue]
        areas = queue.avail, queue.used
        rig.frontend.stop(device.queue)
        queue.reset()
        overlap(queue)
        rig.frontend.start(device.queue, queue)
        for _ in range(20):
            queue.offer([FREE])
            queue.kick(always=True)
            rig.settle()
        queue.avail, queue.used = areas
        rig.restart(device.queue)
        device.honest(rig)


@PACKED
@pytest.mark.parametrize("area", ["descriptors", "avail", "used"])
@pytest.mark.parametrize(
    ("device", "where"), [(DEVICES["blk"], "stepped"), (DEVICES["blk"], "served")], ids=name
)
def test_V11_a_disk_read_into_the_rings_hurts_its_guest_alone(
    device: Device, target: Stepped[Backend] | Served, area: str, packed: bool
) -> None:
    """Buffers may lie on the rings: the device overwrites its own queue as it is told to."""
    with Rig(target, device.queues, packed=packed) as rig:
        queue = rig.queues[0]
        header = rig.ram.put(struct.pack("<IIQ", 0, 0, 0))
        for _ in range(10):
            raw(
                rig,
                queue,
                (header, 16, DESC_F_NEXT, FREE + 1),
                (getattr(queue, area), 512, DESC_F_WRITE | DESC_F_NEXT, FREE + 2),
                (rig.ram.base, 1, DESC_F_WRITE, 0),
            )
            rig.settle()
        rig.restart(0)
        device.honest(rig)


# -- V12: the set-up of rings ----------------------------------------------------------------------------------------


@PACKED
@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V12_a_ring_outside_memory_ends_the_session(
    device: Device, target: Stepped[Backend] | Served, packed: bool
) -> None:
    """Class P when it should start; tests/unit/devices/test_session.py has every field."""
    for area in ("descriptors", "avail", "used"):
        with Rig(target, device.queues, packed=packed) as rig:
            queue = rig.queues[device.queue]
            setattr(queue, area, rig.ram.end)
            rig.frontend.send(FrontendRequest.SET_VRING_ADDR, pack_address(device.queue, queue))
            assert rig.frontend.is_dropped()
    with Rig(target, device.queues, packed=packed) as rig:
        device.honest(rig)


@PACKED
@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V12_enabled_and_set_again_while_running(
    device: Device, target: Stepped[Backend] | Served, packed: bool
) -> None:
    """Twice the same is the same; a ring that moves while it runs goes on at its new place."""
    with Rig(target, device.queues, packed=packed) as rig:
        device.honest(rig)
        for _ in range(5):
            rig.frontend.enable(device.queue)
            rig.frontend.tell(
                FrontendRequest.SET_VRING_ADDR, pack_address(device.queue, rig.queues[device.queue])
            )
            device.honest(rig)


# -- V13: storms -----------------------------------------------------------------------------------------------------


@PACKED
@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V13_kicks_without_buffers_cost_a_wake_each_at_most(
    device: Device, target: Stepped[Backend] | Served, packed: bool
) -> None:
    """They fold into one count of the eventfd; a full one is no trouble either."""
    with Rig(target, device.queues, packed=packed) as rig:
        queue = rig.queues[device.queue]
        for _ in range(2000):
            os.eventfd_write(queue.kick_fd, 1)
        if isinstance(target, Stepped):
            os.eventfd_write(queue.kick_fd, (1 << 64) - 2 - 2000)
        device.honest(rig)
        if isinstance(target, Stepped):
            assert target.backend.queues[device.queue].kicks <= 3


@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V13_a_driver_that_never_reads_the_used_ring(
    device: Device, target: Stepped[Backend] | Served
) -> None:
    """Nothing is kept for it: ten times the queue's size is served as ever."""
    with Rig(target, device.queues) as rig:
        queue = rig.queues[device.queue]
        queue.set_descriptor(FREE, rig.ram.end, 1, 0, 0)
        for turn in range(10):
            queue.offer([FREE] * queue.size)
            queue.kick(always=True)
            assert wait_for(rig, lambda turn=turn: queue.used_index == (turn + 1) * queue.size)  # type: ignore[misc]
        rig.restart(device.queue)
        device.honest(rig)


@pytest.mark.parametrize("used_event", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
@pytest.mark.parametrize("device", list(DEVICES.values()), ids=name)
@pytest.mark.parametrize("where", ["stepped"])
def test_V13_used_event_decides_on_calls_alone(
    device: Device, target: Stepped[Backend], used_event: int
) -> None:
    """Any value: every chain is completed, and at most a call each is sent."""
    with Rig(target, device.queues) as rig:
        queue = rig.queues[device.queue]
        for _ in range(20):
            rig.ram.write(queue.avail + 4 + 2 * queue.size, used_event.to_bytes(2, "little"))
            raw(rig, queue, (rig.ram.end, 1, 0, 0))
            rig.settle()
        assert queue.used_index == 20
        assert target.backend.queues[device.queue].calls <= 20


@PACKED
@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V13_a_kick_after_the_stop_is_nothing(
    device: Device, target: Stepped[Backend] | Served, packed: bool
) -> None:
    """GET_VRING_BASE was answered: the ring is the driver's own again."""
    with Rig(target, device.queues, packed=packed) as rig:
        queue = rig.queues[device.queue]
        device.honest(rig)
        rig.frontend.stop(device.queue)
        before = rig.ram.read(rig.ram.base, rig.ram.size)
        os.eventfd_write(queue.kick_fd, 1)
        for _ in range(5):
            rig.settle()
        assert rig.ram.read(rig.ram.base, rig.ram.size) == before
        rig.restart(device.queue)
        device.honest(rig)


# -- V14: reset while there is work ----------------------------------------------------------------------------------


@PACKED
@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V14_stop_with_work_waiting(device: Device, target: Stepped[Backend] | Served, packed: bool) -> None:
    """Every chain is either completed before the answer or served after the restart; nothing is written in between."""
    with Rig(target, device.queues, packed=packed) as rig:
        queue = rig.queues[device.queue]
        for start in range(3):
            heads = list(range(start, start + 240))
            for head in heads:
                queue.set_descriptor(head, rig.ram.end, 16, 0, 0)
            queue.offer(heads)
            queue.kick(always=True)
            base = rig.frontend.stop(device.queue)
            before = rig.ram.read(rig.ram.base, rig.ram.size)
            for _ in range(3):
                rig.settle()
            assert rig.ram.read(rig.ram.base, rig.ram.size) == before
            assert base == queue.device_base
            rig.frontend.start(device.queue, queue, base=base)
            done = rig.wait_used(device.queue, len(heads))
            assert [head for head, _ in done] == heads


@PACKED
def test_V14_chains_in_flight_are_given_back(packed: bool) -> None:
    """A slow device drops what it has in hand: its completion after the answer writes nothing."""
    with slow_echo() as slow, Rig(slow, 1, packed=packed) as rig:
        queue = rig.queues[0]
        heads = [queue.add([(rig.ram.base, 4)], [(rig.ram.allocate(4), 4)]) for _ in range(20)]
        queue.offer(heads)
        queue.kick()
        rig.settle()
        slow.backend.complete(5)
        base = rig.frontend.stop(0)
        assert base == queue.device_base and queue.used_index == 5
        before = rig.ram.read(rig.ram.base, rig.ram.size)
        slow.backend.complete()
        assert rig.ram.read(rig.ram.base, rig.ram.size) == before
        rig.frontend.start(0, queue, base=base)
        rig.settle()
        slow.backend.complete()
        assert [head for head, _ in queue.collect()] == heads


# -- V15: features that were not negotiated --------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V15_indirect_without_the_feature_breaks_the_queue(
    device: Device, target: Stepped[Backend] | Served
) -> None:
    """The device does not guess."""
    features = Feature.VERSION_1 | Feature.EVENT_IDX | Feature.PROTOCOL_FEATURES
    with Rig(target, device.queues, features=int(features)) as rig:
        queue = rig.queues[device.queue]
        indirect(rig, queue, queue.pack_table([(rig.ram.base, 16, 0)]))
        assert wait_for(rig, queue.has_error)
        assert queue.used_index == 0


@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V15_without_event_idx_the_flags_decide(device: Device, target: Stepped[Backend] | Served) -> None:
    """used_event and avail_event are not looked at, and not written."""
    features = Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.PROTOCOL_FEATURES
    with Rig(target, device.queues, features=int(features), event_idx=False) as rig:
        queue = rig.queues[device.queue]
        for _ in range(5):
            device.honest(rig)
        assert rig.ram.read(queue.used + 4 + 8 * queue.size, 2) == b"\0\0"


@pytest.mark.parametrize(("device", "where"), places(), ids=name)
def test_V15_used_without_any_negotiation(device: Device, target: Stepped[Backend] | Served) -> None:
    """A driver that skipped FEATURES_OK gets a device without features, not a crash."""
    with Rig(target, device.queues, features=0, event_idx=False) as rig:
        queue = rig.queues[device.queue]
        raw(rig, queue, (rig.ram.end, 16, 0, 0))
        assert rig.wait_used(device.queue) == [(FREE, 0)]

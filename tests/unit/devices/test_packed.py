"""The packed virtqueue, device side: what is its own, against a driver by the specification (VIRTIO 1.3, 2.8)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import pytest

from rayos_devices.errors import QueueError
from rayos_devices.virtio.chain import Chain
from rayos_devices.virtio.packed import JOURNAL_WORDS, forget_position, is_packed_base
from rayos_devices.virtio.vring import Vring
from tests.framework.driver import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from tests.framework.guest_memory import GuestRam
from tests.framework.interpreted import interpreted
from tests.framework.kill import Killed, Killer, pairs
from tests.framework.packed_driver import DESC_F_AVAIL, DESC_F_USED, PackedDriverQueue
from tests.framework.target import attach

SIZE = 8

MEMORY = interpreted("memory")
VRING = interpreted("vring", memory=MEMORY, packed=interpreted("packed"))


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(1 << 20) as ram:
        yield ram


@pytest.fixture
def driver(ram: GuestRam) -> Iterator[PackedDriverQueue]:
    driver = PackedDriverQueue(ram, SIZE)
    yield driver
    driver.close()


@pytest.fixture
def vring(driver: PackedDriverQueue) -> Iterator[Vring]:
    vring, memory = attach(driver)
    yield vring
    vring.stop()
    memory.clear()


def new_journal() -> memoryview:
    return memoryview(array("Q", bytes(8 * JOURNAL_WORDS)))


def serve(vring: Vring) -> int:
    """Pop, answer with one byte, publish until nothing is left; how many chains there were."""
    count = 0
    while (chain := vring.pop()) is not None:
        count += 1
        vring.push(chain.head, chain.write(b"!"))
    vring.publish()
    return count


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_chain_is_what_the_driver_laid_out(
    ram: GuestRam, driver: PackedDriverQueue, vring: Vring, indirect: bool
) -> None:
    """Readable buffers in order, then writable ones; a used descriptor tells id and length."""
    first, second, room = ram.put(b"first "), ram.put(b"second"), ram.allocate(4)
    head = driver.submit([(first, 6), (second, 6)], [(room, 4)], indirect=indirect)
    chain = vring.pop()
    assert chain is not None
    assert (chain.head, chain.readable_bytes, chain.writable_bytes) == (0, 12, 4)
    assert chain.read(100) == b"first second"
    assert chain.write(b"answer") == 4
    vring.push(chain.head, 4)
    assert driver.collect() == [], "nothing is visible before the publish"
    vring.publish()
    assert driver.element(0)[1:] == (4, head, DESC_F_AVAIL | DESC_F_USED | DESC_F_WRITE)
    assert driver.collect() == [(head, 4)]
    assert driver.was_called()


def test_around_the_ring_many_times(ram: GuestRam, driver: PackedDriverQueue, vring: Vring) -> None:
    """Chains of one to three descriptors lie across the end; the wrap counters tell the rounds apart."""
    room = ram.allocate(16)
    for turn in range(100):
        heads = [
            driver.submit([(room, 1)] * (turn % 3), [(room, 1)]),
            driver.submit([], [(room, 1)], indirect=True),
        ]
        assert serve(vring) == 2
        assert driver.collect() == [(head, 1) for head in heads]
    assert vring.used_index == vring.next_used_index == 200
    assert vring.requests == 200 and not vring.is_waiting()


def test_the_driver_chooses_the_ids(ram: GuestRam, driver: PackedDriverQueue, vring: Vring) -> None:
    """2.8: an id is any u16, also one that is in flight: it comes back as it was."""
    room = ram.allocate(16)
    for identifier in (0xFFFF, 7, 7, 0):
        driver.write([(room, 1, DESC_F_WRITE, 0)], identifier)
    assert serve(vring) == 4
    assert [driver.element(at)[2] for at in range(4)] == [0xFFFF, 7, 7, 0]


def test_the_id_of_the_last_descriptor_counts(ram: GuestRam, driver: PackedDriverQueue, vring: Vring) -> None:
    """2.8.6: those before it have none."""
    room = ram.allocate(16)
    driver.set_element(1, room, 1, 5, DESC_F_AVAIL | DESC_F_WRITE)
    driver.set_element(0, room, 1, 9, DESC_F_AVAIL | DESC_F_NEXT)
    assert serve(vring) == 1
    assert driver.element(0)[2] == 5


def test_a_chain_that_was_put_back_comes_again(
    ram: GuestRam, driver: PackedDriverQueue, vring: Vring
) -> None:
    """Also one that lies across the end of the ring, and one that fills it."""
    room = ram.allocate(16)
    for count in (SIZE, 3, SIZE, 7, SIZE, 2):
        driver.submit([], [(room, 1)] * count)
        before = vring.pop()
        assert before is not None and vring.pop() is None
        vring.unpop(before.head)
        again = vring.pop()
        assert again is not None and (again.head, len(again.writable)) == (before.head, count)
        vring.push(again.head, 0)
        vring.publish()
        assert len(driver.collect()) == 1


@pytest.mark.parametrize("event_idx", [True, False], ids=["event_idx", "flags"])
def test_each_side_is_told_when_it_asked(ram: GuestRam, event_idx: bool) -> None:
    """2.8.10: with the feature at one descriptor in one round, without it at all or at none."""
    driver = PackedDriverQueue(ram, SIZE, event_idx=event_idx)
    vring, memory = attach(driver)
    room = ram.allocate(4)
    assert not vring.arm()
    for turn in range(40):
        driver.add([], [(room, 1)])
        head = next(iter(driver._chains))
        driver.offer([head])
        assert driver.needs_kick(), "armed, and it is the first"
        driver.kick()
        assert vring.arm(), "one is there"
        assert serve(vring) == 1
        assert driver.was_called() == (turn == 0 or turn % 4 != 3)
        assert not vring.arm()
        driver.collect()
        if turn % 4 == 2:
            driver.disarm()
    vring.stop()
    memory.clear()
    driver.close()


def test_a_call_at_a_later_descriptor(ram: GuestRam, driver: PackedDriverQueue, vring: Vring) -> None:
    """The driver sleeps until the third from here is used; batches step over it, also across the end."""
    room = ram.allocate(4)
    driver.submit([], [(room, 1)])
    serve(vring)
    assert driver.was_called() and driver.collect()
    for _ in range(11):
        driver.arm(ahead=2)
        for expected in (False, False, True):
            driver.submit([], [(room, 1)])
            serve(vring)
            assert driver.was_called() == expected
        while driver.is_used(driver.done):  # collect, which arms, would be heard of
            head = driver.element(driver.done[0])[2]
            driver.free.extend(driver._chains.pop(head))
            driver.done = driver.step(driver.done, 1)


@pytest.mark.parametrize(
    ("descriptors", "says"),
    [
        ([(0, 1, DESC_F_NEXT)] * SIZE, "longer than 8"),
        ([(0, 16, DESC_F_INDIRECT | DESC_F_NEXT)], "both INDIRECT and NEXT"),
        ([(0, 1, DESC_F_NEXT), (0, 16, DESC_F_INDIRECT)], "inside a chain"),
        ([(0, 0, DESC_F_INDIRECT)], "indirect table of 0 bytes"),
        ([(0, 17, DESC_F_INDIRECT)], "indirect table of 17 bytes"),
        ([(1 << 40, 16, DESC_F_INDIRECT)], "outside guest memory"),
    ],
)
def test_what_breaks_the_queue(
    ram: GuestRam,
    driver: PackedDriverQueue,
    vring: Vring,
    descriptors: list[tuple[int, int, int]],
    says: str,
) -> None:
    """Class Q: latched, told once, nothing is parsed any more."""
    driver.write([(ram.base + address, length, flags, 0) for address, length, flags in descriptors], 3)
    with pytest.raises(QueueError, match=says):
        vring.pop()
    assert driver.has_error()
    assert vring.pop() is None and not vring.arm() and not vring.is_waiting()


def test_a_nested_table_breaks_the_queue_and_next_in_a_table_is_nothing(
    ram: GuestRam, driver: PackedDriverQueue, vring: Vring
) -> None:
    """2.8.7: its descriptors follow each other, whatever their NEXT says; ids in it mean nothing."""
    buffers = [(ram.base, 1, 0), (ram.base, 2, DESC_F_NEXT), (ram.base, 4, DESC_F_WRITE)]
    table = b"".join(
        address.to_bytes(8, "little") + length.to_bytes(4, "little") + b"\x63\0" + bytes([flags, 0])
        for address, length, flags in buffers
    )
    driver.write([(ram.put(table), 48, DESC_F_INDIRECT, 0)], 1)
    chain = vring.pop()
    assert chain is not None and (chain.readable_bytes, chain.writable_bytes) == (3, 4)
    driver.write([(ram.put(bytes(14) + b"\4\0"), 16, DESC_F_INDIRECT, 0)], 2)
    with pytest.raises(QueueError, match="nested"):
        vring.pop()


def test_a_descriptor_in_flight_is_not_taken_again(
    ram: GuestRam, driver: PackedDriverQueue, vring: Vring
) -> None:
    """A driver that goes around before the device did: class Q, and no slot is ever written twice by one publish."""
    for _ in range(SIZE + 1):
        driver.write([(ram.base, 1, DESC_F_WRITE, 0)], 1)
    for _ in range(SIZE):
        assert vring.pop() is None  # the slots say the next round
        break
    driver.reset()
    for index in range(SIZE):
        driver.write([(ram.base, 1, DESC_F_WRITE, 0)], index)
    assert sum(vring.pop() is not None for _ in range(SIZE)) == SIZE
    driver.write([(ram.base, 1, DESC_F_WRITE, 0)], 9)
    with pytest.raises(QueueError, match="in flight"):
        vring.pop()


def test_a_base_is_inside_its_ring() -> None:
    """Next available and next used, each with its wrap counter, at most the ring apart."""
    assert is_packed_base(0x80008000, 8) and is_packed_base(0, 8) and is_packed_base(0x80030005 | 0x8000, 8)
    assert is_packed_base(0x80000000, 8), "a full ring in flight"
    assert is_packed_base(0x80030003, 8) and is_packed_base(0x80030002, 8)
    assert not is_packed_base(0x80030004, 8), "9 of 8 in flight"
    assert not is_packed_base(0x80058004, 8), "used before it was available"
    assert not is_packed_base(0x80008008, 8) and not is_packed_base(0x80088000, 8)


def test_a_stopped_queue_goes_on_from_its_base(
    ram: GuestRam, driver: PackedDriverQueue, vring: Vring
) -> None:
    """`stop` tells both positions; the count of completed chains goes on in the journal."""
    room = ram.allocate(4)
    for turn in range(5):
        driver.submit([(room, 1)], [(room, 1)])
        serve(vring)
        driver.collect()
        base = vring.stop()
        place = 2 * (turn + 1) % SIZE
        wrap = 2 * (turn + 1) // SIZE % 2 == 0
        assert base == (place | wrap << 15) * 0x10001
        journal = vring.journal
        vring, _ = attach(driver, base=base, journal=journal)
        assert vring.used_index == turn + 1
    vring.stop()


@pytest.mark.parametrize(
    ("base", "room"),
    [(0x80008000, 8), (0x80000000, 0), (0x80060002, 4), (0x00068002, 4), (0x80038005, 6), (0x80070000, 7)],
)
def test_a_base_with_chains_in_flight(ram: GuestRam, driver: PackedDriverQueue, base: int, room: int) -> None:
    """A frontend may hand over a ring with some; also when the available position is around and the used is not."""
    assert is_packed_base(base, SIZE)
    vring, memory = attach(driver, base=base)
    driver.offered = base & 0x7FFF, base >> 15 & 1
    driver.write(
        [(ram.base, 1, DESC_F_WRITE | DESC_F_NEXT, 0)] * (room - 1) + [(ram.base, 1, DESC_F_WRITE, 0)], 1
    )
    if room:
        assert vring.take() == base & 0x7FFF
    else:
        with pytest.raises(QueueError, match="in flight"):
            vring.take()
    vring.stop()
    memory.clear()


def test_only_a_fresh_ring_is_unused(ram: GuestRam, driver: PackedDriverQueue, vring: Vring) -> None:
    """Twice around, the positions are as in the beginning; the driver's memory is not."""
    assert vring.is_unused
    room = ram.allocate(4)
    for _ in range(2 * SIZE):
        driver.submit([], [(room, 1)])
        serve(vring)
        driver.collect()
    base, journal = vring.stop(), vring.journal
    assert base == driver.start
    again, _ = attach(driver, base=base, journal=journal)
    assert not again.is_unused
    again.stop()
    driver.reset()
    fresh, _ = attach(driver, journal=journal)
    assert fresh.is_unused
    fresh.stop()


def test_a_forgotten_position_is_the_frontends(ram: GuestRam, driver: PackedDriverQueue) -> None:
    """A queue that was stopped before its worker died; a journal that does not fit is not believed either."""
    journal = new_journal()
    vring, _ = attach(driver, journal=journal)
    driver.submit([], [(ram.base, 1)])
    serve(vring)
    resumed, _ = attach(driver, journal=journal, resumed=True)
    assert resumed.stop() == 0x80018001
    forget_position(journal)
    resumed, _ = attach(driver, journal=journal, resumed=True)
    assert resumed.used_index == 1
    assert resumed.stop() == driver.start
    journal[0] = journal[0] & ~0x7FFF | SIZE
    resumed, _ = attach(driver, journal=journal, resumed=True)
    assert resumed.stop() == driver.start


class Killable:
    """Serves three chains at a time in one publish, killed at chosen effects, resumed by successors."""

    def __init__(self, ram: GuestRam, killer: Killer, *, greedy: bool) -> None:
        self.ram, self.killer, self.greedy = ram, killer, greedy
        self.driver = PackedDriverQueue(ram, SIZE)
        self.journal = new_journal()
        self.kills = 0
        #: As a device's state: what it says, and the count that makes it true.
        self.saved = (0, 0), (0, 0)
        self.attach(resumed=False)
        self.seen: list[tuple[int, int]] = []

    def attach(self, *, resumed: bool) -> None:
        driver, memory = self.driver, MEMORY.GuestMemory()
        memory.replace([self.ram.spec], [self.ram.fd])
        self.vring = VRING.Vring(0)
        self.vring.journal = self.journal
        areas = (driver.descriptors, 16 * SIZE), (driver.avail, 4), (driver.used, 4)
        self.vring.attach(
            memory,
            SIZE,
            *(memory.view(*area) for area in areas),
            base=driver.start,
            resumed=resumed,
            packed=True,
            event_idx=True,
            indirect=True,
        )

    def turn(self) -> None:
        vring = self.vring
        while True:
            chains: list[Chain] = []
            while len(chains) < 3 and (chain := vring.pop()) is not None:
                chains.append(chain)
            if not chains:
                return
            for chain in chains:
                vring.push(chain.head, chain.write(chain.read(4)))
            handled = self.saved[1][1] + len(chains)
            self.saved = self.saved[1], (vring.next_used_index, handled)
            vring.publish()

    def run(self) -> None:
        while True:
            try:
                self.killer.run(self.turn)
                return
            except Killed:
                self.kills += 1
            while True:
                try:
                    self.killer.run(self.take_over)
                    break
                except Killed:
                    self.kills += 1

    def take_over(self) -> None:
        if self.greedy:  # the driver goes on while there is no worker
            self.seen += self.driver.collect()
        self.attach(resumed=True)
        if self.vring.used_index != self.saved[1][0]:
            self.saved = self.saved[0], self.saved[0]


def scenario(killer: Killer, *, greedy: bool) -> None:
    with GuestRam(1 << 16) as ram:
        bench = Killable(ram, killer, greedy=greedy)
        driver, expected = bench.driver, []
        for turn in range(4):
            rooms = []
            for index in range(3 if turn % 2 else 2):
                data = bytes([turn, index, 1, 2])
                room = ram.allocate(4)
                head = driver.submit([(ram.put(data), 4)], [(room, 4)], indirect=index == 2)
                rooms.append((room, data))
                expected.append((head, 4))
            bench.run()
            bench.seen += driver.collect()
            assert all(ram.read(room, 4) == data for room, data in rooms)
        assert bench.seen == expected, "each chain once, in order"
        assert bench.saved[1] == (10, 10), "and its effect on a device's state once"
        bench.vring.stop()
        driver.close()


@pytest.mark.parametrize("greedy", [False, True], ids=["patient", "greedy"])
def test_killed_at_any_store_nothing_is_lost_and_nothing_done_twice(greedy: bool) -> None:
    """Before each store, and again while the successor takes over."""
    killer = Killer()
    scenario(killer, greedy=greedy)
    assert killer.count > 100
    for target in range(killer.count):
        scenario(Killer(target), greedy=greedy)
    for first, second in pairs(killer.count, (1, 3) if greedy else (2, 5)):
        scenario(Killer(first, second), greedy=greedy)

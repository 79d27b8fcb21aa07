"""The vring against a model: a list of what was offered, a set of what is in flight."""

from __future__ import annotations

from collections import deque

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayos_devices.errors import DeviceError, QueueError
from rayos_devices.virtio.chain import Chain
from rayos_devices.virtio.vring import Vring
from tests.framework.driver import DriverQueue
from tests.framework.guest_memory import GuestRam
from tests.framework.target import attach

SIZE = 8
#: A chain: lengths of its readable and of its writable buffers, indirect or not, sound or with a buffer outside memory.
CHAIN = st.tuples(
    st.lists(st.integers(0, 5), max_size=3),
    st.lists(st.integers(0, 5), max_size=3),
    st.booleans(),
    st.sampled_from([True, True, True, False]),
).filter(lambda chain: chain[0] or chain[1])
STEP = st.one_of(
    st.tuples(st.just("offer"), st.lists(CHAIN, min_size=1, max_size=4)),
    st.tuples(st.just("pop"), st.just(None)),
    st.tuples(st.just("unpop"), st.just(None)),
    st.tuples(st.just("complete"), st.integers(0, SIZE)),
    st.tuples(st.just("publish"), st.just(None)),
    st.tuples(st.just("collect"), st.just(None)),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    start=st.sampled_from([0, 1, 65531, 65535]),
    event_idx=st.booleans(),
    steps=st.lists(STEP, min_size=1, max_size=50),
)
def test_every_chain_comes_back_once_with_its_bytes(
    start: int, event_idx: bool, steps: list[tuple[str, object]]
) -> None:
    """Popped in the order of offering, as laid out; bad ones come back unused; used entries in completion order."""
    with GuestRam(1 << 20) as ram:
        driver = DriverQueue(ram, SIZE, event_idx=event_idx)
        driver._avail_index = driver._used_index = driver._kicked_index = start
        driver._avail[1] = driver._used[1] = start
        vring, memory = attach(driver, base=start)
        try:
            Model(ram, driver, vring).run(steps)
        finally:
            vring.stop()
            memory.clear()
            driver.close()


class Model:
    def __init__(self, ram: GuestRam, driver: DriverQueue, vring: Vring) -> None:
        self.ram, self.driver, self.vring = ram, driver, vring
        self.offered: deque[tuple[int, bytes, int, bool]] = deque()
        self.flying: list[tuple[Chain, bytes, int]] = []
        self.completed: list[tuple[int, int]] = []
        self.visible: list[tuple[int, int]] = []
        self.errors = 0
        self.can_unpop = False

    def run(self, steps: list[tuple[str, object]]) -> None:
        for name, argument in steps:
            getattr(self, name)(argument)
        self.publish(None)
        while self.offered or self.flying:
            self.pop(None)
            self.complete(0)
            self.publish(None)
            self.collect(None)
        self.collect(None)
        assert len(self.driver.free) == SIZE
        assert self.vring.chain_errors == self.errors

    def offer(self, chains: object) -> None:
        assert isinstance(chains, list)
        heads = []
        for readable, writable, indirect, is_sound in chains:
            needed = 1 if indirect else len(readable) + len(writable)
            if len(self.driver.free) < needed:
                break
            data = bytes(range(1, 1 + sum(readable)))
            buffers, done = [], 0
            for length in readable:
                buffers.append((self.ram.put(data[done : done + length], 1), length))
                done += length
            room = [(self.ram.allocate(length, 1), length) for length in writable]
            if not is_sound:
                bad = (self.ram.end, 1)
                (room if room else buffers)[-1] = bad
            heads.append(self.driver.add(buffers, room, indirect=indirect))
            self.offered.append((heads[-1], data, sum(writable), is_sound))
        self.driver.offer(heads)
        self.driver.kick()

    def pop(self, _: object) -> None:
        while self.offered and not self.offered[0][3]:
            self.errors += 1
            self.completed.append((self.offered.popleft()[0], 0))
        chain = self.vring.pop()
        if not self.offered:
            assert chain is None
            self.can_unpop = False
            return
        assert chain is not None
        head, data, room, _ = self.offered.popleft()
        assert chain.head == head
        assert chain.read(1000) == data
        assert (chain.readable_bytes, chain.writable_bytes) == (len(data), room)
        self.flying.append((chain, data, room))
        self.can_unpop = True

    def unpop(self, _: object) -> None:
        if self.can_unpop:
            chain, data, room = self.flying.pop()
            self.vring.unpop(chain.head)
            self.offered.appendleft((chain.head, data, room, True))
            self.can_unpop = False

    def complete(self, which: object) -> None:
        assert isinstance(which, int)
        if self.flying:
            chain, _, room = self.flying.pop(which % len(self.flying))
            assert chain.write(b"z" * (room + 1)) == room
            self.vring.push(chain.head, room)
            self.completed.append((chain.head, room))
            self.can_unpop = False

    def publish(self, _: object) -> None:
        before = self.driver.used_index
        self.vring.publish()
        assert (self.driver.used_index - before) & 0xFFFF == len(self.completed)
        self.visible += self.completed
        self.completed = []

    def collect(self, _: object) -> None:
        assert self.driver.collect() == self.visible
        self.visible = []


@settings(max_examples=300, deadline=None)
@given(
    table=st.binary(min_size=16 * SIZE, max_size=16 * SIZE),
    fields=st.lists(
        st.tuples(
            st.integers(0, SIZE - 1),
            st.sampled_from([0, 1, 2, 3, 4, 5]),
            st.integers(0, SIZE),
            st.integers(-64, 2048),
            st.sampled_from([0, 1, 16, 32, 128, 0xFFFF, 0xFFFFFFFF]),
        ),
        max_size=SIZE,
    ),
    heads=st.lists(st.integers(0, SIZE), min_size=1, max_size=2 * SIZE),
    index=st.one_of(st.none(), st.integers(0, 65535)),
)
def test_no_ring_content_escapes(
    table: bytes, fields: list[tuple[int, int, int, int, int]], heads: list[int], index: int | None
) -> None:
    """Any bytes: only QueueError, views inside memory, a bounded number of steps, each head in flight at most once."""
    with GuestRam(8192) as ram:
        driver = DriverQueue(ram, SIZE)
        ram.write(driver.descriptors, table)
        for position, flags, following, offset, length in fields:
            driver.set_descriptor(position, ram.base + offset, length, flags, following)
        driver.offer(heads)
        if index is not None:
            driver.set_avail_index(index)
        vring, memory = attach(driver)
        try:
            flying: set[int] = set()
            for _ in range(65536):
                chain = vring.pop()
                if chain is None:
                    break
                assert chain.head not in flying
                flying.add(chain.head)
                assert sum(map(len, chain.readable)) == chain.readable_bytes
                assert sum(map(len, chain.writable)) == chain.writable_bytes
            assert vring.requests <= SIZE
        except QueueError:
            assert vring.broken
        except DeviceError as error:
            raise AssertionError("another class escaped") from error
        finally:
            chain = None
            vring.stop()
            memory.clear()
            driver.close()

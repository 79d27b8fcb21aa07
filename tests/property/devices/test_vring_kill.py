"""Both rings under a device that works in order and is killed between any two of its steps: nothing is lost or told
twice."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayos_devices.virtio.chain import Chain
from rayos_devices.virtio.packed import JOURNAL_WORDS
from tests.framework.driver import DriverQueue
from tests.framework.guest_memory import GuestRam
from tests.framework.packed_driver import PackedDriverQueue
from tests.framework.target import attach

SIZE = 8
#: Lengths of a chain's readable and writable buffers, indirect or not.
CHAIN = st.tuples(
    st.lists(st.integers(1, 5), max_size=3), st.lists(st.integers(1, 5), max_size=3), st.booleans()
).filter(lambda chain: chain[0] or chain[1])
STEP = st.tuples(
    st.sampled_from(["offer", "offer", "pop", "pop", "complete", "complete", "publish", "collect", "kill"]),
    CHAIN,
)


class Offered(NamedTuple):
    """A chain that the driver made available: its name for it, the bytes to read, the room to write."""

    head: int
    data: bytes
    room: int


class Model:
    """`waiting` is not taken, `taken` is not completed, `pushed` is not told: all in the order of offering."""

    def __init__(self, ram: GuestRam, driver: DriverQueue) -> None:
        self.ram, self.driver = ram, driver
        self.waiting: deque[Offered] = deque()
        self.taken: deque[tuple[Chain, Offered]] = deque()
        self.pushed: list[Offered] = []
        self.told: list[tuple[int, int]] = []
        self.journal = memoryview(bytearray(8 * JOURNAL_WORDS)).cast("Q")
        self.vring, self.memory = attach(driver, journal=self.journal)

    def offer(self, readable: list[int], writable: list[int], indirect: bool) -> None:
        if len(self.driver.free) < (1 if indirect else len(readable) + len(writable)):
            return
        data = bytes(range(1, 1 + sum(readable)))
        at = self.ram.put(data, 1)
        buffers = [(at + sum(readable[:index]), length) for index, length in enumerate(readable)]
        room = [(self.ram.allocate(length, 1), length) for length in writable]
        head = self.driver.submit(buffers, room, indirect=indirect)
        self.waiting.append(Offered(head, data, sum(writable)))

    def pop(self) -> None:
        chain = self.vring.pop()
        assert (chain is not None) == bool(self.waiting)
        if chain is not None:
            offered = self.waiting.popleft()
            assert (chain.read(1000), chain.writable_bytes) == (offered.data, offered.room)
            self.taken.append((chain, offered))

    def complete(self) -> None:
        if self.taken:
            chain, offered = self.taken.popleft()
            chain.write(b"z" * offered.room)
            self.vring.push(chain.head, offered.room)
            self.pushed.append(offered)

    def publish(self) -> None:
        self.vring.publish()
        self.told += [(offered.head, offered.room) for offered in self.pushed]
        self.pushed = []

    def collect(self) -> None:
        assert self.driver.collect() == self.told
        self.told = []

    def kill(self) -> None:
        """A successor has the rings and the journal; what was not told is to be done."""
        self.memory.clear()
        self.waiting.extendleft(reversed([*self.pushed, *(offered for _, offered in self.taken)]))
        self.pushed = []
        self.taken.clear()
        self.vring, self.memory = attach(self.driver, journal=self.journal, resumed=True)

    def finish(self) -> None:
        while self.waiting or self.taken or self.pushed:
            self.pop()
            self.complete()
            self.publish()
        self.collect()
        assert len(self.driver.free) == SIZE

    def close(self) -> None:
        self.vring.stop()
        self.memory.clear()
        self.driver.close()


@pytest.mark.parametrize("kind", [DriverQueue, PackedDriverQueue])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(event_idx=st.booleans(), steps=st.lists(STEP, min_size=40, max_size=80))
def test_nothing_is_lost_or_told_twice(
    kind: type[DriverQueue],
    event_idx: bool,
    steps: list[tuple[str, tuple[list[int], list[int], bool]]],
) -> None:
    with GuestRam(1 << 20) as ram:
        model = Model(ram, kind(ram, SIZE, event_idx=event_idx))
        try:
            for name, chain in steps:
                if name == "offer":
                    model.offer(*chain)
                else:
                    getattr(model, name)()
            model.finish()
        finally:
            model.close()

"""Every injected event arrives exactly once, whenever the worker is killed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from rayos_devices.input.backend import InputBackend
from rayos_devices.input.codes import Key
from rayos_devices.input.wire import EVENT, EVENT_QUEUE, STATUS_QUEUE, EventType, Led, Rel
from rayos_devices.loop import Loop
from rayos_devices.state import StateStore
from rayos_devices.virtio.features import TRANSPORT_FEATURES
from tests.framework.kill import Bench, Killer, every_kill, pairs

pytestmark = pytest.mark.interpreted

Event = tuple[int, int, int]
SYN = (0, 0, 0)


def press(key: int) -> list[Event]:
    return [(EventType.KEY, key, 1), SYN, (EventType.KEY, key, 0), SYN]


class Guest:
    def __init__(self, killer: Killer, kind: str) -> None:
        self.state_fd = os.memfd_create("state")

        def make(loop: Loop) -> InputBackend:
            state = StateStore(self.state_fd, InputBackend.STATE_BYTES)
            return InputBackend("input", loop, kind, state=state)  # type: ignore[arg-type]

        self.bench = Bench(make, TRANSPORT_FEATURES, killer)
        self.events: list[Event] = []
        self._rooms: dict[int, int] = {}

    def room(self, count: int) -> None:
        driver = self.bench.queues[EVENT_QUEUE]
        for _ in range(count):
            address = self.bench.ram.allocate(EVENT.size)
            head = driver.add(writable=[(address, EVENT.size)])
            self._rooms[head] = address
            driver.offer([head])

    def light(self, led: int, value: int) -> None:
        driver = self.bench.queues[STATUS_QUEUE]
        address = self.bench.ram.put(EVENT.pack(EventType.LED, led, value))
        driver.offer([driver.add(readable=[(address, EVENT.size)])])

    def collect(self) -> None:
        for head, written in self.bench.queues[EVENT_QUEUE].collect():
            address = self._rooms.pop(head)
            if written:
                self.events.append(EVENT.unpack(self.bench.ram.read(address, written)))

    def inject(self, events: list[Event], token: int) -> int:
        return self.bench.call(partial(InputBackend.inject, events=events, token=token))

    def close(self) -> None:
        self.bench.close()
        os.close(self.state_fd)


@contextmanager
def guest(killer: Killer, kind: str = "keyboard") -> Iterator[Guest]:
    made = Guest(killer, kind)
    try:
        yield made
    finally:
        made.close()


def typing(killer: Killer) -> None:
    """A guest with room for a part, then for the rest."""
    with guest(killer) as g:
        g.room(6)
        g.inject(press(Key.KEY_A), 1)
        g.inject(press(Key.KEY_B) + press(Key.KEY_C), 2)
        g.bench.run()
        g.collect()
        assert g.events == (press(Key.KEY_A) + press(Key.KEY_B))[:6]
        g.room(7)
        g.bench.run()
        g.collect()
        assert g.events == press(Key.KEY_A) + press(Key.KEY_B) + press(Key.KEY_C)


def lights(killer: Killer) -> None:
    with guest(killer) as g:
        for led, value in ((Led.NUM, 1), (Led.CAPS, 1), (Led.NUM, 0)):
            g.light(led, value)
            g.bench.run()
        assert g.bench.backend.leds == 1 << Led.CAPS
        assert g.bench.queues[STATUS_QUEUE].used_index == 3


def motion(killer: Killer) -> None:
    """Merged motion adds up to the way that was made."""
    with guest(killer, "mouse") as g:
        g.room(2)
        for number in range(5):
            g.inject([(EventType.REL, Rel.X, 1 + number), (EventType.REL, Rel.Y, -1)], number + 1)
        g.bench.run()
        g.room(12)
        g.bench.run()
        g.collect()
        assert sum(v for t, c, v in g.events if (t, c) == (EventType.REL, Rel.X)) == 15
        assert sum(v for t, c, v in g.events if (t, c) == (EventType.REL, Rel.Y)) == -5


SCENARIOS = [typing, lights, motion]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_once_at_every_instruction(scenario: Callable[[Killer], None]) -> None:
    assert len(list(every_kill(scenario))) > 30


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_twice(scenario: Callable[[Killer], None]) -> None:
    unharmed = Killer()
    scenario(unharmed)
    for first, second in pairs(unharmed.count, (7, 23, 61)):
        scenario(Killer(first, second))

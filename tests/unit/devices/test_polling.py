"""Looking for work instead of sleeping: how long, that nothing is lost between the two, and that it can be switched."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest

from rayos_devices.halt_polling import HaltPolling
from rayos_devices.loop import Loop
from rayos_devices.native import fence
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.port import EchoPort
from rayos_devices.net.wire import HEADER_BYTES
from tests.framework.target import Rig, Stepped, Threaded

FRAME = bytes(HEADER_BYTES) + b"\x02\0\0\0\0\x01" + b"\x02\0\0\0\0\x02" + b"\x08\x00" + bytes(46)
BUFFER_BYTES = 256


def test_patience_grows_while_it_pays_and_ends_when_it_does_not() -> None:
    """Short sleeps would have been worth looking through; long ones halve the window, down to nothing."""
    polling = HaltPolling(80e-6)
    assert polling.window == 0.0
    windows = []
    for _ in range(5):
        polling.slept(50e-6)
        windows.append(round(polling.window * 1e6))
    assert windows == [10, 20, 40, 80, 80]
    for _ in range(4):
        polling.slept(1.0)
    assert polling.window == 0.0


def test_without_a_budget_nobody_looks() -> None:
    polling = HaltPolling()
    polling.slept(1e-6)
    assert polling.window == 0.0
    with pytest.raises(ValueError, match=r"0 \(never\) or more"):
        HaltPolling(-1.0)


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


class Counter:
    """Watched, and never anything to do but `work` times."""

    def __init__(self, work: int) -> None:
        self.looks = 0
        self.work = work
        self.states: list[bool] = []

    def poll(self) -> bool:
        self.looks += 1
        self.work -= 1
        return self.work >= 0

    def set_awake(self, awake: bool) -> bool:
        self.states.append(awake)
        return self.work > 0


def test_a_loop_looks_after_a_short_sleep_and_rests_when_nothing_comes() -> None:
    """Work that is seen at the last moment before the sleep is done; when polling ends, somebody has to wake it."""
    loop = Loop()
    counter = Counter(0)
    loop.watch(counter)
    loop.step(0.001)
    assert counter.looks == 0
    loop.set_polling(1e6)
    loop.step(0.0001)  # a sleep far within the budget
    assert counter.states == [True]
    loop.step(0.0001)
    assert counter.looks == 16
    counter.work = 3
    loop.set_polling(0.0)
    assert counter.states == [True, False]
    loop.step()  # does not sleep: there was something to do
    assert counter.work == 2
    loop.unwatch(counter)
    loop.close()


def test_a_ready_descriptor_is_work_too(event: int) -> None:
    """A loop that has only descriptors goes on looking as long as they have something to say."""
    loop = Loop()
    seen: list[int] = []
    loop.register(event, lambda _: seen.append(os.eventfd_read(event)))
    loop.set_polling(1e6)
    loop.step(0.0001)
    loop._worked = -1e9  # the window of the last work has long passed
    for _ in range(2):
        os.eventfd_write(event, 1)
        loop.step(0.0)
    assert seen == [1, 1]
    before = loop.polled_seconds
    loop.step()  # neither sleeps nor rests
    assert loop.polled_seconds > before
    loop.close()


def test_frames_are_seen_without_a_kick_while_the_loop_looks() -> None:
    """The device neither asks for kicks nor needs them; once it rests it does both."""
    with Stepped(lambda loop: NetBackend("net", loop, EchoPort())) as target, Rig(target, 2) as rig:
        rx, tx = rig.queues
        target.loop.set_polling(1e6)
        target.settle()
        source, room = rig.ram.put(FRAME), rig.ram.allocate(BUFFER_BYTES)
        target.loop.step(0.0001)
        heads = []
        for turn in range(2):  # the first kick had been asked for before
            rx.submit([], [(room, BUFFER_BYTES)])
            heads.append(tx.add([(source, len(FRAME))]))
            tx.offer(heads[-1:])
            assert tx.needs_kick() == (turn == 0)
            tx.kick()
            for _ in range(3):
                target.loop.step(0.0001)
        assert tx.collect() == [(head, 0) for head in heads] and len(rx.collect()) == 2
        assert target.backend.queues[1].kicks == 1
        target.loop.set_polling(0.0)
        tx.offer([tx.add([(source, len(FRAME))])])
        assert tx.needs_kick()


@pytest.mark.parametrize("budget", [50e-6, 2e-3])
def test_nothing_is_lost_between_looking_and_sleeping(budget: float) -> None:
    """Echoed frames with pauses about as long as the budget, kicks only where the device asked for one."""
    chance = random.Random(5)
    with Threaded(lambda loop: NetBackend("net", loop, EchoPort())) as target, Rig(target, 2) as rig:
        target.call(lambda: target.loop.set_polling(budget))
        rx, tx = rig.queues
        source, room = rig.ram.put(FRAME), rig.ram.allocate(BUFFER_BYTES)
        for turn in range(1500):
            for queue, readable, writable in (
                (rx, [], [(room, BUFFER_BYTES)]),
                (tx, [(source, len(FRAME))], []),
            ):
                queue.offer([queue.add(readable, writable)])
                fence()
                queue.kick()
            while not rx.collect():
                assert rx.wait(20), f"frame {turn} never came back"
            tx.collect()
            pause = time.perf_counter() + chance.choice([0.0, 0.5, 1.0, 1.5]) * 50e-6
            while time.perf_counter() < pause:
                pass
            if turn % 500 == 250:
                target.call(lambda: target.loop.set_polling(0.0))
                target.call(lambda: target.loop.set_polling(budget))

"""The loop every backend runs in: descriptors, deadlines, leftovers, and a stop that ends the wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from rayos_devices.loop import WRITE, Loop
from tests.framework.target import Footprint


@pytest.fixture
def loop() -> Iterator[Loop]:
    before = Footprint()
    loop = Loop()
    yield loop
    loop.close()
    before.check()


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_a_ready_descriptor_calls_back_until_it_is_served(loop: Loop, event: int) -> None:
    """Level-triggered: nothing is lost when a callback leaves something behind."""
    seen: list[int] = []
    loop.register(event, seen.append)
    loop.step(0)
    assert seen == []
    os.eventfd_write(event, 1)
    loop.step(0)
    loop.step(0)
    assert len(seen) == 2
    os.eventfd_read(event)
    loop.step(0)
    assert len(seen) == 2


def test_interest_can_change_and_end(loop: Loop, event: int) -> None:
    """modify and unregister; unknown descriptors are ignored."""
    seen: list[int] = []
    loop.register(event, seen.append)
    loop.modify(event, WRITE)
    loop.step(0)
    assert seen == [WRITE]
    loop.unregister(event)
    loop.unregister(event)
    loop.unregister(12345)
    loop.step(0)
    assert seen == [WRITE]
    loop.register(event, seen.append)


def test_a_callback_may_unregister_another_that_is_ready(loop: Loop, event: int) -> None:
    """The second one of the same round is not called any more."""
    other = os.eventfd(1)
    os.eventfd_write(event, 1)
    called: list[str] = []

    def first(_events: int) -> None:
        called.append("first")
        loop.unregister(other)
        loop.unregister(event)

    loop.register(event, first)
    loop.register(other, first)
    loop.step(0)
    os.close(other)
    assert called == ["first"]


def test_deadlines_come_in_their_order(loop: Loop) -> None:
    """Whatever the order of asking; equal ones as they were asked for."""
    order: list[str] = []
    now = loop.now()
    for name, delay in (("late", 0.02), ("early", 0.0), ("early too", 0.0), ("middle", 0.01)):
        loop.call_at(now + delay, lambda name=name: order.append(name))  # type: ignore[misc]
    while len(order) < 4:
        loop.step()
    assert order == ["early", "early too", "middle", "late"]
    assert loop.now() >= now + 0.02


def test_a_cancelled_deadline_does_not_come(loop: Loop) -> None:
    """Also when it is cancelled by one that is due in the same round."""
    order: list[str] = []
    now = loop.now()
    loop.call_at(now, lambda: loop.cancel(second))
    second = loop.call_at(now, lambda: order.append("second"))
    loop.call_at(now, lambda: order.append("third"))
    loop.step(0)
    assert order == ["third"]


def test_work_for_later_waits_for_ready_descriptors(loop: Loop, event: int) -> None:
    """A queue with more than its budget lets everybody else have a turn, and nothing sleeps meanwhile."""
    order: list[str] = []
    os.eventfd_write(event, 1)
    loop.register(event, lambda _events: order.append("ready"))

    def again() -> None:
        order.append("leftover")
        if len(order) < 6:
            loop.call_soon(again)

    loop.call_soon(again)
    for _ in range(3):
        loop.step(60)
    assert order == ["ready", "leftover"] * 3


def test_step_waits_no_longer_than_asked(loop: Loop) -> None:
    """With nothing to do, and with a deadline further away."""
    loop.call_at(loop.now() + 60, lambda: None)
    start = time.monotonic()
    loop.step(0.01)
    assert 0.005 < time.monotonic() - start < 5


def test_stop_ends_run_from_a_callback(loop: Loop) -> None:
    """The round is finished first; the loop can run again."""
    for _ in range(2):
        loop.call_soon(loop.stop)
        loop.run()


def test_stop_ends_a_wait_from_another_thread(loop: Loop) -> None:
    """An idle loop sleeps without a limit."""
    timer = threading.Timer(0.05, loop.stop)
    timer.start()
    start = time.monotonic()
    loop.run()
    timer.join()
    assert time.monotonic() - start < 5


def test_stop_ends_a_wait_from_a_signal_handler(loop: Loop) -> None:
    """Python takes up an interrupted epoll again (PEP 475), so the handler alone would change nothing."""
    before = signal.signal(signal.SIGALRM, lambda *_: loop.stop())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        start = time.monotonic()
        loop.run()
        assert time.monotonic() - start < 5
    finally:
        signal.signal(signal.SIGALRM, before)

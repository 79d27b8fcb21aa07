"""The event ring: every event in order, or a gap that says how many are missing."""

from __future__ import annotations

import trio
import trio.testing

from rayos_vmm.events import Event, EventLog


async def test_a_reader_sees_what_was_and_what_comes() -> None:
    """Replay from a sequence number runs into the live events without hole or repetition."""
    log = EventLog(size=8)
    log.publish("a")
    log.publish("b", "vm", state="x")
    seen: list[Event] = []
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            async for event in log.follow(1):
                seen.append(event)

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        log.publish("c")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [(event.seq, event.type) for event in seen] == [(2, "b"), (3, "c")]
    assert seen[0].vm == "vm" and seen[0].data == {"state": "x"}


def test_a_reader_that_fell_behind_sees_the_gap() -> None:
    """The number of missed events is exact, and sequence numbers go on."""
    log = EventLog(size=4)
    for _ in range(10):
        log.publish("x")
    events = log.after(2)
    assert events[0].type == "gap" and events[0].data == {"missed": 4}
    assert [event.seq for event in events] == [6, 7, 8, 9, 10]
    assert log.after(10) == []


def test_a_number_of_a_former_service_starts_over() -> None:
    """A reader that knew a longer log gets everything that is kept."""
    log = EventLog(size=4)
    log.publish("x")
    assert [event.type for event in log.after(4711)] == ["gap", "x"]

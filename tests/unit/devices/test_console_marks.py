"""When bytes came: every byte's mark, bounded, and the same for a successor."""

from __future__ import annotations

from bisect import bisect_right

from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_devices.console.marks import MARKS, MARKS_BYTES, MERGE_NS, MarkRing
from rayos_devices.console.port import PORT_BYTES, ConsolePort, PortSpec


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3 * MERGE_NS)), min_size=1, max_size=60), st.data()
)
def test_every_byte_has_the_time_at_which_it_came(
    arrivals: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Within a millisecond, for any part of the output that is asked about."""
    ring, count, offset, now = MarkRing(memoryview(bytearray(MARKS_BYTES))), 0, 0, 10**18
    times = []
    for size, pause in arrivals:
        now += pause
        count = ring.store(count, offset, now)
        times += [now] * size
        offset += size
    start = data.draw(st.integers(0, offset - 1))
    end = data.draw(st.integers(start + 1, offset))
    marks = ring.between(count, start, end, 1000)
    assert marks[0][0] <= start and marks == sorted(marks) and all(at < end for at, _ in marks)
    for byte in range(start, end):
        _, said = marks[bisect_right([at for at, _ in marks], byte) - 1]
        assert said <= times[byte] < said + MERGE_NS
    assert ring.between(count, start, end, 1) == marks[:1]


def test_old_marks_are_forgotten() -> None:
    ring, count = MarkRing(memoryview(bytearray(MARKS_BYTES))), 0
    total = 2 * MARKS + 17
    for number in range(total):
        count = ring.store(count, number, number * MERGE_NS)
    assert count == total
    oldest = total - MARKS
    assert ring.between(count, 0, 1, 9) == [(oldest, oldest * MERGE_NS)]
    assert ring.between(count, total - 2, total, 9) == [(n, n * MERGE_NS) for n in (total - 2, total - 1)]


def test_a_successor_knows_the_times() -> None:
    memory = memoryview(bytearray(PORT_BYTES))
    first = ConsolePort(0, PortSpec(""), memory)
    first.take_output([memoryview(b"one")], 5 * MERGE_NS)
    first.take_output([memoryview(b"two")], 9 * MERGE_NS)
    second = ConsolePort(0, PortSpec(""), memory)
    second.unpack(first.pack())
    assert second.marks_of(1, 6, 9) == [(0, 5 * MERGE_NS), (3, 9 * MERGE_NS)]
    first.take_output([memoryview(b"lost")], 20 * MERGE_NS)  # and never saved
    assert second.marks_of(0, 6, 9) == [(0, 5 * MERGE_NS), (3, 9 * MERGE_NS)]

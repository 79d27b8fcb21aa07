"""The injection queue: what is merged, what is dropped, and that nothing ever sticks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_devices.errors import RequestError
from rayos_devices.input.codes import Button, Key
from rayos_devices.input.model import KINDS, Event
from rayos_devices.input.report import SYN, ReportQueue, is_motion, merge, split
from rayos_devices.input.wire import EVENT, Abs, EventType, Rel

KEY, REL, ABS = EventType.KEY, EventType.REL, EventType.ABS


def drain(queue: ReportQueue, count: int | None = None) -> list[Event]:
    return [queue.take() for _ in range(queue.size if count is None else min(count, queue.size))]


def down(code: int) -> list[Event]:
    return [(KEY, code, 1), SYN]


def up(code: int) -> list[Event]:
    return [(KEY, code, 0), SYN]


def test_split_ends_every_report() -> None:
    """A missing SYN_REPORT is added, empty input makes no report."""
    assert split([]) == []
    assert split([(KEY, 30, 1)]) == [[(KEY, 30, 1), SYN]]
    assert split([(KEY, 30, 1), SYN, (KEY, 30, 0)]) == [[(KEY, 30, 1), SYN], [(KEY, 30, 0), SYN]]


def test_relative_motion_adds_up() -> None:
    queue = ReportQueue(64)
    for x, y in ((3, 1), (4, -2), (-10, 0)):
        assert queue.admit([(REL, Rel.X, x), (REL, Rel.Y, y), SYN]) == 0
    assert drain(queue) == [(REL, Rel.X, -3), (REL, Rel.Y, -1), SYN]


def test_absolute_motion_takes_the_latest() -> None:
    queue = ReportQueue(64)
    queue.admit([(ABS, Abs.X, 5), (ABS, Abs.Y, 6), SYN])
    queue.admit([(ABS, Abs.X, 7), SYN])
    assert drain(queue) == [(ABS, Abs.X, 7), (ABS, Abs.Y, 6), SYN]


def test_motion_is_not_merged_across_a_button() -> None:
    """The click happens where the pointer was."""
    queue = ReportQueue(64)
    reports = [[(REL, Rel.X, 1), SYN], down(Button.BTN_LEFT), [(REL, Rel.X, 2), SYN]]
    for report in reports:
        queue.admit(report)
    assert drain(queue) == [event for report in reports for event in report]


def test_motion_is_not_merged_into_a_report_the_guest_has_begun() -> None:
    queue = ReportQueue(64)
    queue.admit([(REL, Rel.X, 1), (REL, Rel.Y, 1), SYN])
    assert queue.take() == (REL, Rel.X, 1)
    queue.admit([(REL, Rel.X, 5), SYN])
    assert drain(queue) == [(REL, Rel.Y, 1), SYN, (REL, Rel.X, 5), SYN]


def test_merged_relative_motion_stays_in_range() -> None:
    assert merge([(REL, Rel.X, 2**31 - 1), SYN], [(REL, Rel.X, 5), SYN]) == [(REL, Rel.X, 2**31 - 1), SYN]


def test_naming_buttons_that_are_up_is_still_motion() -> None:
    """Who says the whole state with every step does not fill the queue."""
    queue = ReportQueue(64)
    for x in range(100):
        assert queue.fits([(ABS, Abs.X, x), (KEY, Button.BTN_LEFT, 0), (KEY, Button.BTN_RIGHT, 0), SYN])
        assert queue.admit([(ABS, Abs.X, x), (KEY, Button.BTN_LEFT, 0), (KEY, Button.BTN_RIGHT, 0), SYN]) == 0
    assert drain(queue) == [(ABS, Abs.X, 99), SYN]


def test_a_release_of_nothing_says_nothing() -> None:
    queue = ReportQueue(64)
    assert queue.admit(up(30)) == 0
    assert drain(queue) == []
    assert queue.admit([(KEY, 30, 1), (KEY, 30, 0), SYN]) == 0
    assert drain(queue) == [(KEY, 30, 1), (KEY, 30, 0), SYN]


def test_fingers_are_merged_each_alone() -> None:
    """Two slots in one report keep their positions apart, and a report names its slot itself."""
    queue = ReportQueue(64)
    queue.admit([(ABS, Abs.MT_SLOT, 1), (ABS, Abs.MT_POSITION_X, 10), SYN])
    queue.admit([(ABS, Abs.MT_POSITION_X, 11), SYN])
    queue.admit([(ABS, Abs.MT_SLOT, 0), (ABS, Abs.MT_POSITION_X, 20), SYN])
    assert drain(queue) == [
        (ABS, Abs.MT_SLOT, 0),
        (ABS, Abs.MT_POSITION_X, 20),
        (ABS, Abs.MT_SLOT, 1),
        (ABS, Abs.MT_POSITION_X, 11),
        SYN,
    ]


def test_a_press_is_refused_when_its_release_would_not_fit() -> None:
    """With room for 8: two keys down (4 events, 4 reserved); the third press is dropped, both releases fit."""
    queue = ReportQueue(8)
    assert [queue.admit(down(key)) for key in (30, 31, 32)] == [0, 0, 1]
    assert [queue.admit(up(key)) for key in (30, 31)] == [0, 0]
    assert drain(queue) == [*down(30), *down(31), *up(30), *up(31)]


def test_motion_makes_room_for_keys() -> None:
    """The oldest motion is dropped and counted."""
    queue = ReportQueue(8)
    queue.admit([(REL, Rel.X, 1), (REL, Rel.Y, 1), SYN])
    queue.admit(down(30))
    assert queue.admit(up(30)) == 0
    assert queue.admit(down(31)) == 1
    assert drain(queue) == [*down(30), *up(30), *down(31)]


def test_a_report_that_does_not_fit_is_cut_to_its_releases() -> None:
    queue = ReportQueue(8)
    queue.admit(down(30))
    queue.admit(down(31))
    dropped = queue.admit([(KEY, 40, 1), (KEY, 30, 0), (KEY, 41, 1), SYN])
    assert dropped == 1
    assert drain(queue) == [*down(30), *down(31), *up(30)]


def test_a_finger_is_always_lifted() -> None:
    queue = ReportQueue(12)
    touch = [(ABS, Abs.MT_SLOT, 2), (ABS, Abs.MT_TRACKING_ID, 7), (ABS, Abs.MT_POSITION_X, 1), SYN]
    assert queue.admit(touch) == 0
    assert queue.admit([*touch[:1], (ABS, Abs.MT_SLOT, 3), (ABS, Abs.MT_TRACKING_ID, 8), SYN]) == 1
    assert queue.admit([(ABS, Abs.MT_SLOT, 2), (ABS, Abs.MT_TRACKING_ID, -1), SYN]) == 0
    assert (ABS, Abs.MT_TRACKING_ID, -1) in drain(queue)


def test_a_packed_queue_unpacks_to_the_same() -> None:
    queue = ReportQueue(64)
    queue.admit(down(30))
    queue.admit([(ABS, Abs.MT_SLOT, 2), (ABS, Abs.MT_TRACKING_ID, 7), SYN])
    queue.admit([(ABS, Abs.X, 3), SYN])
    queue.take()
    packed = queue.pack()
    copy = ReportQueue(64)
    copy.unpack(packed)
    assert copy.pack() == packed
    assert len(packed) <= ReportQueue.state_bytes(64)
    assert drain(copy) == drain(queue)
    assert (copy.keys, copy.fingers) == ({30}, {2})


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_kind_says_what_it_takes(kind: Any) -> None:
    """An event that a device cannot make is refused with those that are allowed."""
    for event in (
        (9, 0, 0),
        (EventType.LED, 0, 1),
        (0, 2, 0),
        (0, 0, 1),
        (KEY, 0x2FF, 1),
        (ABS, 0x3F, 0),
        (1, 2),
    ):
        with pytest.raises(RequestError, match=r"allowed|has no|needed"):
            kind.check(event)
    with pytest.raises(RequestError, match="0 to 2"):
        kind.check((KEY, min(kind.bits[KEY]), 3))
    assert kind.check([0, 0, 0]) == SYN


# -- nothing sticks ----------------------------------------------------------------------------------------------

_TOUCH = KINDS["touch"]
_KEYS = (Key.KEY_A, Key.KEY_LEFTSHIFT, Key.KEY_ENTER, Key.KEY_F1, Button.BTN_TOUCH)

_event = st.one_of(
    st.tuples(st.just(KEY), st.sampled_from(_KEYS), st.sampled_from((0, 1, 1, 2))),
    st.tuples(st.just(REL), st.sampled_from((Rel.X, Rel.Y)), st.integers(-5, 5)),
    st.tuples(st.just(ABS), st.sampled_from((Abs.X, Abs.Y, Abs.MT_POSITION_X)), st.integers(0, 99)),
    st.tuples(st.just(ABS), st.just(Abs.MT_SLOT), st.integers(0, 3)),
    st.tuples(st.just(ABS), st.just(Abs.MT_TRACKING_ID), st.sampled_from((-1, 4, 5))),
)
_step = st.one_of(st.lists(_event, min_size=1, max_size=6), st.integers(1, 12))


class Kernel:
    """The keys that the guest believes to be down."""

    def __init__(self) -> None:
        self.keys: set[int] = set()
        self.fingers: set[int] = set()
        self._slot = 0

    def see(self, event: Event) -> None:
        kind, code, value = event
        if kind == KEY and value == 1:
            self.keys.add(code)
        elif kind == KEY and value == 0:
            self.keys.discard(code)
        elif kind == ABS and code == Abs.MT_SLOT:
            self._slot = value
        elif kind == ABS and code == Abs.MT_TRACKING_ID:
            (self.fingers.discard if value < 0 else self.fingers.add)(self._slot)


@settings(max_examples=400, deadline=None)
@given(st.integers(8, 40), st.lists(_step, max_size=60))
def test_no_key_and_no_finger_sticks(limit: int, steps: list[Any]) -> None:
    """Whatever is injected at whatever pace it is taken: the guest never sees down what was released.

    And the queue keeps its limit, with the room for every release.
    """
    queue, guest, typist = ReportQueue(limit), Kernel(), Kernel()
    for step in steps:
        if isinstance(step, int):
            for event in drain(queue, step):
                guest.see(event)
        else:
            for report in split(step):
                for event in report:
                    typist.see(event)
                queue.admit(report)
            assert queue.size + 2 * len(queue.keys) + 3 * len(queue.fingers) <= limit
            assert queue.size * EVENT.size <= len(queue.pack())
    for event in drain(queue):
        guest.see(event)
    assert guest.keys <= typist.keys
    assert guest.fingers <= typist.fingers
    assert guest.keys == queue.keys
    assert guest.fingers == queue.fingers


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), max_size=30), st.integers(0, 5))
def test_merged_motion_covers_the_way(way: list[tuple[int, int]], pace: int) -> None:
    queue = ReportQueue(64)
    seen: list[Event] = []
    for x, y in way:
        assert queue.admit([(REL, Rel.X, x), (REL, Rel.Y, y), SYN]) == 0
        seen += drain(queue, pace)
    seen += drain(queue)
    assert is_motion(seen)
    assert sum(v for t, c, v in seen if (t, c) == (REL, Rel.X)) == sum(x for x, _ in way)
    assert sum(v for t, c, v in seen if (t, c) == (REL, Rel.Y)) == sum(y for _, y in way)

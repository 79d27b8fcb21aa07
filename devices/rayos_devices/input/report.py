"""The queue between whoever injects and a guest that may be slow: what is merged, what is dropped, what never is.

A report is the events up to and with a SYN_REPORT. The queue holds at most `limit` events. The rules:

* A report of motion alone is merged into the last waiting one of its kind: relative axes add up, absolute ones take
  the latest value. So a slow guest sees fewer steps and the same way.
* Every key and every finger that is down has the room for its release reserved. A press that would take that room
  is refused, so a release always fits: nothing sticks.
* When a report does not fit, the oldest waiting motion goes first; then the report itself, but for its releases.

Multi-touch events mean the slot selected before them, maybe reports ago. Reports are made self-contained on the way
in, so that each can be dropped or merged alone.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from rayos_devices.input.model import Event
from rayos_devices.input.wire import EVENT, SYN_REPORT, Abs, EventType

SYN: Final[Event] = (EventType.SYN, SYN_REPORT, 0)
_INT32_MIN: Final = -(1 << 31)
_INT32_MAX: Final = (1 << 31) - 1
_MT: Final = frozenset((Abs.MT_POSITION_X, Abs.MT_POSITION_Y, Abs.MT_TRACKING_ID))
#: Events reserved for the release of a key (itself, SYN) and of a finger (slot, tracking id, SYN).
_KEY_ROOM: Final = 2
_FINGER_ROOM: Final = 3

#: Keys as a bitmap up to BTN_TOUCH and beyond.
_KEY_BYTES: Final = 0x180 // 8
_HEAD: Final = struct.Struct(f"<{_KEY_BYTES}sHBBH")


def split(events: Sequence[Event]) -> list[list[Event]]:
    """The events as whole reports; a missing SYN_REPORT at the end is added."""
    reports: list[list[Event]] = [[]]
    for event in events:
        reports[-1].append(event)
        if event[0] == EventType.SYN:
            reports.append([])
    if reports[-1]:
        reports[-1].append(SYN)
    else:
        reports.pop()
    return reports


def is_motion(report: Sequence[Event]) -> bool:
    """Whether nothing of it must arrive in person."""
    return all(
        kind in (EventType.SYN, EventType.REL) or (kind == EventType.ABS and code != Abs.MT_TRACKING_ID)
        for kind, code, _ in report
    )


def _by_slot(report: Sequence[Event]) -> Iterator[tuple[int, Event]]:
    """Each event but slots and SYN with the slot it means; -1 for those that mean none."""
    slot = -1
    for event in report:
        kind, code, value = event
        if kind == EventType.ABS and code == Abs.MT_SLOT:
            slot = value
        elif kind != EventType.SYN:
            yield (slot if kind == EventType.ABS and code in _MT else -1), event


def merge(older: Sequence[Event], newer: Sequence[Event]) -> list[Event]:
    """One report of motion that does what two did."""
    values: dict[tuple[int, int, int], int] = {}
    for slot, (kind, code, value) in (*_by_slot(older), *_by_slot(newer)):
        if kind == EventType.REL:
            value += values.get((slot, kind, code), 0)
        values[slot, kind, code] = max(_INT32_MIN, min(_INT32_MAX, value))
    merged: list[Event] = []
    current = -1
    for slot, kind, code in sorted(values, key=lambda key: key[0]):
        if slot != current:
            current = slot
            merged.append((EventType.ABS, Abs.MT_SLOT, slot))
        merged.append((kind, code, values[slot, kind, code]))
    return [*merged, SYN]


class ReportQueue:
    """Whole reports in, single events out. `size` events wait, at most `limit` with what is reserved.

    `keys` and `fingers` are what is down once everything here has arrived.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.keys: set[int] = set()
        self.fingers: set[int] = set()
        self._reports: deque[list[Event]] = deque()
        self._is_begun = False
        self._slot = 0

    @staticmethod
    def state_bytes(limit: int) -> int:
        """The most that `pack` takes."""
        return _HEAD.size + limit * EVENT.size

    def pack(self) -> bytes:
        keys = sum(1 << key for key in self.keys).to_bytes(_KEY_BYTES, "little")
        fingers = sum(1 << finger for finger in self.fingers)
        head = _HEAD.pack(keys, fingers, self._slot, self._is_begun, self.size)
        return head + b"".join([EVENT.pack(*event) for report in self._reports for event in report])

    def unpack(self, data: bytes) -> None:
        keys, fingers, self._slot, is_begun, self.size = _HEAD.unpack_from(data)
        bits = int.from_bytes(keys, "little")
        self.keys = {key for key in range(8 * _KEY_BYTES) if bits >> key & 1}
        self.fingers = {finger for finger in range(16) if fingers >> finger & 1}
        self._is_begun = bool(is_begun)
        end = _HEAD.size + self.size * EVENT.size
        self._reports = deque(split(list(EVENT.iter_unpack(data[_HEAD.size : end]))))

    # -- in ------------------------------------------------------------------------------------------------------

    def fits(self, report: Sequence[Event]) -> bool:
        """Whether `admit` would take it whole and drop nothing."""
        report = self._complete(report)
        if len(report) == 1 or self._merged(report):
            return True
        return self.size + len(report) + _reserve(*self._after(report)) <= self.limit

    def admit(self, report: Sequence[Event]) -> int:
        """Take a report in; returns how many reports were dropped or cut for want of room."""
        asked, report = report, self._complete(report)
        # Also of a slot that was left out: the next report may mean it.
        self._slot = next(
            (v for k, c, v in reversed(asked) if (k, c) == (EventType.ABS, Abs.MT_SLOT)), self._slot
        )
        if len(report) == 1:
            return 0
        merged = self._merged(report)
        if merged:
            self.size += len(merged) - len(self._reports[-1])
            self._reports[-1] = merged
            return 0
        wanted = len(report) + _reserve(*self._after(report))
        dropped = 0
        while self.size + wanted > self.limit:
            if not self._drop_oldest_motion():
                self._append(self._releases(report))
                return dropped + 1
            dropped += 1
        self._append(report)
        return dropped

    def _complete(self, report: Sequence[Event]) -> list[Event]:
        """Completes a report. Releases of keys and fingers that are up are left out (who names all of them with every
        motion still moves only); the slot is said before the first event that means one.
        """
        down, fingers = set(self.keys), set(self.fingers)
        complete: list[Event] = []
        has_slot = False
        slot = self._slot
        for event in report:
            kind, code, value = event
            if kind == EventType.KEY:
                if value == 0 and code not in down:
                    continue
                (down.add if value else down.discard)(code)
            elif kind == EventType.ABS and code == Abs.MT_SLOT:
                has_slot = True
                slot = value
            elif kind == EventType.ABS and code == Abs.MT_TRACKING_ID and value < 0 and slot not in fingers:
                if complete and complete[-1] == (EventType.ABS, Abs.MT_SLOT, slot):
                    complete.pop()
                    has_slot = False
                continue
            elif kind == EventType.ABS and code in _MT and not has_slot:
                has_slot = True
                complete.append((EventType.ABS, Abs.MT_SLOT, slot))
            if kind == EventType.ABS and code == Abs.MT_TRACKING_ID:
                (fingers.discard if value < 0 else fingers.add)(slot)
            complete.append(event)
        return complete

    def _merged(self, report: list[Event]) -> list[Event]:
        """The last waiting report with this one in it; empty when they cannot be one."""
        if not self._reports or (self._is_begun and len(self._reports) == 1):
            return []
        last = self._reports[-1]
        if not is_motion(report) or not is_motion(last):
            return []
        merged = merge(last, report)
        size = self.size + len(merged) - len(last)
        return merged if size + _reserve(self.keys, self.fingers) <= self.limit else []

    def _after(self, report: Sequence[Event]) -> tuple[set[int], set[int]]:
        """Keys and fingers that are down after the report."""
        keys, fingers = set(self.keys), set(self.fingers)
        for slot, (kind, code, value) in _by_slot(report):
            if kind == EventType.KEY and value != 2:
                (keys.add if value else keys.discard)(code)
            elif kind == EventType.ABS and code == Abs.MT_TRACKING_ID:
                (fingers.discard if value < 0 else fingers.add)(slot)
        return keys, fingers

    def _releases(self, report: Sequence[Event]) -> list[Event]:
        """Returns the part of a report that must arrive although it does not fit: the releases of all that is down."""
        kept: list[Event] = []
        keys, fingers = set(self.keys), set(self.fingers)
        for slot, event in _by_slot(report):
            kind, code, value = event
            if kind == EventType.KEY and value == 0 and code in keys:
                keys.discard(code)
                kept.append(event)
            elif kind == EventType.ABS and code == Abs.MT_TRACKING_ID and value < 0 and slot in fingers:
                fingers.discard(slot)
                kept += [(EventType.ABS, Abs.MT_SLOT, slot), event]
        return [*kept, SYN] if kept else []

    def _append(self, report: list[Event]) -> None:
        if report:
            self.keys, self.fingers = self._after(report)
            self._reports.append(report)
            self.size += len(report)

    def _drop_oldest_motion(self) -> bool:
        for index, report in enumerate(self._reports):
            if is_motion(report) and not (index == 0 and self._is_begun):
                del self._reports[index]
                self.size -= len(report)
                return True
        return False

    # -- out -----------------------------------------------------------------------------------------------------

    def take(self) -> Event:
        """The next event; there must be one (`size`)."""
        report = self._reports[0]
        event = report.pop(0)
        self.size -= 1
        self._is_begun = bool(report)
        if not report:
            self._reports.popleft()
        return event

    def clear(self) -> None:
        """Nothing waits and nothing is down."""
        self._reports.clear()
        self.keys.clear()
        self.fingers.clear()
        self.size = self._slot = 0
        self._is_begun = False


def _reserve(keys: set[int], fingers: set[int]) -> int:
    return _KEY_ROOM * len(keys) + _FINGER_ROOM * len(fingers)

"""Input as it happened: steps with times, heard by any number of recorders, and what a replay must let go.

A recorder that does not keep up loses its recording, never the typist his key: it ends with `Lagged`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Final

import msgspec
import trio
from msgspec import Meta

from rayos_vmm.errors import Unavailable

#: Steps that wait for one recorder.
WAITING_MAXIMUM: Final = 4096
#: Recorders of one machine at a time.
RECORDINGS_MAXIMUM: Final = 8
#: Steps of one replay, and events of one step.
STEPS_MAXIMUM: Final = 10_000
EVENTS_MAXIMUM: Final = 1024
SECONDS_MAXIMUM: Final = 3600.0
#: A recording's first line, beside the machine's name.
FORMAT: Final = {"format": "rayos-input", "version": 1}
_EV_KEY, _EV_ABS = 1, 3
_MT_SLOT, _MT_TRACKING_ID = 0x2F, 0x39


_Code = Annotated[int, Meta(ge=0, le=0xFFFF)]
#: Type, code and value of struct input_event (linux/input.h).
EvdevEvent = tuple[_Code, _Code, Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)]]


class Lagged(Unavailable):
    """A recorder did not keep up, or there are too many."""

    code = "lagged"


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Events (type, code, value) that one device got at once, `t` seconds after the recording began."""

    t: Annotated[float, Meta(ge=0, le=SECONDS_MAXIMUM)]
    device: Annotated[str, Meta(max_length=32)]
    events: Annotated[list[EvdevEvent], Meta(max_length=EVENTS_MAXIMUM)]


class Recording:
    """Steps from now on, in their order: iterate. Ends with the machine."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Step](WAITING_MAXIMUM)
        self._started = math.nan
        self._has_lagged = False

    def note(self, now: float, device: str, events: Sequence[tuple[int, int, int]]) -> None:
        if math.isnan(self._started):
            self._started = now
        step = Step(t=round(now - self._started, 4), device=device, events=list(events))
        try:
            self._send.send_nowait(step)
        except trio.WouldBlock:
            self._has_lagged = True
            self._send.close()
        except trio.ClosedResourceError:
            return

    def close(self) -> None:
        self._send.close()

    def __aiter__(self) -> Recording:
        return self

    async def __anext__(self) -> Step:
        """Raises Lagged when steps were lost."""
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            if self._has_lagged:
                raise Lagged(f"more than {WAITING_MAXIMUM} steps waited for this recorder") from None
            raise StopAsyncIteration from None


class Recordings:
    """The recorders of one machine. A recording's time begins with its first step."""

    def __init__(self) -> None:
        self._open: list[Recording] = []

    def note(self, device: str, events: Sequence[tuple[int, int, int]]) -> None:
        """These events were handed to a device."""
        for recording in self._open:
            recording.note(trio.current_time(), device, events)

    def check(self) -> None:
        """Raises Lagged when there are RECORDINGS_MAXIMUM already."""
        if len(self._open) >= RECORDINGS_MAXIMUM:
            raise Lagged(f"{RECORDINGS_MAXIMUM} recorders are the most that a machine has at a time")

    @contextmanager
    def open(self) -> Iterator[Recording]:
        """Another one; raises as `check`."""
        self.check()
        recording = Recording()
        self._open.append(recording)
        try:
            yield recording
        finally:
            self._open.remove(recording)
            recording.close()

    def close(self) -> None:
        """The machine has ended."""
        for recording in self._open:
            recording.close()


class Held:
    """Keys and fingers that are down after the steps noted so far."""

    def __init__(self) -> None:
        self._keys: dict[tuple[str, int], None] = {}
        self._fingers: dict[tuple[str, int], None] = {}
        self._slots: dict[str, int] = {}

    def note(self, device: str, events: Sequence[tuple[int, int, int]]) -> None:
        for kind, code, value in events:
            if kind == _EV_KEY:
                self._set(self._keys, device, code, is_down=bool(value))
            elif kind == _EV_ABS and code == _MT_SLOT:
                self._slots[device] = value
            elif kind == _EV_ABS and code == _MT_TRACKING_ID:
                self._set(self._fingers, device, self._slots.get(device, 0), is_down=value >= 0)

    @staticmethod
    def _set(down: dict[tuple[str, int], None], device: str, what: int, *, is_down: bool) -> None:
        if is_down:
            down[device, what] = None
        else:
            down.pop((device, what), None)

    def releases(self) -> list[tuple[str, list[tuple[int, int, int]]]]:
        """The events that let everything go, by device."""
        events: dict[str, list[tuple[int, int, int]]] = {}
        for device, finger in self._fingers:
            events.setdefault(device, []).extend(
                [(_EV_ABS, _MT_SLOT, finger), (_EV_ABS, _MT_TRACKING_ID, -1)]
            )
        for device, key in self._keys:
            events.setdefault(device, []).append((_EV_KEY, key, 0))
        return list(events.items())

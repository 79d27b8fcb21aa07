"""The input devices: injected events into the guest's buffers, its lights back (VIRTIO 1.3, 5.8).

An event travels: `inject` -> gate -> `ReportQueue.admit` -> `_move` -> the guest's buffers -> `settle`. What waits is
saved, so that a successor delivers each event exactly once (`rayos_devices.durable`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final, Literal

from rayos_devices.durable import DurableBackend
from rayos_devices.errors import ConfigurationError, DeniedError, QueueError, RequestError
from rayos_devices.gate import OPEN, Denial, Gate, Op
from rayos_devices.idempotency import IdempotentResults
from rayos_devices.input.codes import key_name
from rayos_devices.input.model import KINDS, Event
from rayos_devices.input.report import ReportQueue, split
from rayos_devices.input.wire import (
    CONFIG_BYTES,
    CONFIG_HEADER,
    EVENT,
    EVENT_QUEUE,
    STATUS_QUEUE,
    EventType,
    Led,
    Select,
)
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.native import now_ns
from rayos_devices.state import StateStore
from rayos_devices.stats import Stats
from rayos_devices.virtio.chain import Chain
from rayos_devices.virtio.features import DeviceId

DEFAULT_QUEUE_LIMIT: Final = 64
#: A key pressed and released beside a key that is held.
MIN_QUEUE_LIMIT: Final = 8
MAX_QUEUE_LIMIT: Final = 1024


def _no_status(_kind: int, _code: int, _value: int) -> None:
    """A hook that nobody set."""


def _nothing() -> None:
    """A hook that nobody set."""


class InputBackend(DurableBackend):
    """A keyboard, mouse, tablet or touch screen; `queue_limit` events may wait for the guest.

    `leds` has the bit of each light that is on (`wire.Led`). Hooks, called on the loop's thread: `on_status(type, code,
    value)` when the guest said something, `on_room` after it took events.
    """

    device_id = DeviceId.INPUT
    BUDGET: ClassVar[int] = 128
    #: Capacity the StateStore must have.
    STATE_BYTES: ClassVar[int] = 1 + IdempotentResults.STATE_BYTES + ReportQueue.state_bytes(MAX_QUEUE_LIMIT)

    def __init__(
        self,
        name: str,
        loop: Loop,
        kind: Literal["keyboard", "mouse", "tablet", "touch"],
        *,
        state: StateStore | None = None,
        gate: Gate = OPEN,
        queue_limit: int = DEFAULT_QUEUE_LIMIT,
    ) -> None:
        """Errors: ConfigurationError for a limit that is too small to work with or too large."""
        if not MIN_QUEUE_LIMIT <= queue_limit <= MAX_QUEUE_LIMIT:
            raise ConfigurationError(
                f"an input queue of {queue_limit} events: {MIN_QUEUE_LIMIT} to {MAX_QUEUE_LIMIT} are allowed"
            )
        store = state or StateStore(None, self.STATE_BYTES)
        super().__init__(name, 2, loop, Stats(Op.INPUT_INJECT, Op.INPUT_POLL), gate, store=store)
        self.kind = KINDS[kind]
        self.leds = 0
        self.on_status: Callable[[int, int, int], object] = _no_status
        self.on_room: Callable[[], object] = _nothing
        self._waiting = ReportQueue(queue_limit)
        self._results = IdempotentResults()
        self._select = self._subsel = 0
        self._has_room_news = False
        self._is_refused = False
        self.restore()

    # -- state that outlives the worker --------------------------------------------------------------------------

    def pack_state(self) -> bytes:
        return bytes([self.leds]) + self._results.pack() + self._waiting.pack()

    def unpack_state(self, payload: bytes) -> None:
        self.leds = payload[0]
        end = 1 + IdempotentResults.STATE_BYTES
        self._results.unpack(payload[1:end])
        self._waiting.unpack(payload[end:])

    def ready_again(self) -> None:
        self.on_room()

    def forget_driver(self) -> None:
        self.leds = 0

    # -- accounting ----------------------------------------------------------------------------------------------

    LIMITS = (Limit.QUEUE,)
    LEAST = MIN_QUEUE_LIMIT

    @property
    def depth(self) -> int:
        return self._waiting.size

    def limit(self, limit: Limit) -> int:
        return self._waiting.limit

    def apply_limit(self, limit: Limit, value: int) -> None:
        """Waiting events stay; no more are taken before there is room."""
        if not MIN_QUEUE_LIMIT <= value <= MAX_QUEUE_LIMIT:
            raise RequestError(
                f"an input queue of {value} events: {MIN_QUEUE_LIMIT} to {MAX_QUEUE_LIMIT} are allowed"
            )
        self._waiting.limit = value

    def apply_ceilings(self, ceilings: Mapping[str, int]) -> None:
        self.cap_limit(Limit.QUEUE, ceilings["input_queue"])

    def listen(self, on_news: Callable[[], None]) -> None:
        self.on_room = on_news

    # -- the host's side -----------------------------------------------------------------------------------------

    def inject(self, events: Sequence[Sequence[int]], *, token: int = 0) -> int:
        """Queue evdev events (type, code, value); returns how many reports a full queue dropped or cut.

        A missing SYN_REPORT at the end is added. The same `token` (not 0) again does nothing and returns the same.
        Errors: RequestError for events that this device cannot make, when the gate refuses, or until a successor knows
        its predecessor's state (`on_room` tells); nothing is queued then.
        """
        reports = self._check(events)
        if self.is_undecided:
            raise RequestError(f"the {self.kind.name} is being taken over: it takes events a moment later")
        done = self._results.find(token)
        if done is not None:
            return done
        dropped = sum([self._admit(report) for report in reports])
        self._finish(token, dropped)
        return dropped

    def offer(self, events: Sequence[Sequence[int]], *, token: int = 0) -> int:
        """As `inject`, but only as many whole reports as fit without dropping; returns how many of `events` they were.

        0 when there is no room until `on_room`.
        """
        reports = self._check(events)
        if self.is_undecided:
            return 0
        done = self._results.find(token)
        if done is not None:
            return done
        taken = 0
        for report in reports:
            # What does not even fit into an empty queue would wait for ever.
            if not self._waiting.fits(report) and self._waiting.size:
                break
            self._admit(report)
            taken += len(report)
        taken = min(taken, len(events))  # without the SYN_REPORT that was added
        if taken:
            self._finish(token, taken)
        return taken

    def _check(self, events: Sequence[Sequence[int]]) -> list[list[Event]]:
        started = now_ns()
        try:
            reports = split([self.kind.check(event) for event in events])
        except RequestError:
            self.stats.deny(Op.INPUT_INJECT, Denial.INVALID, 0, started)
            raise
        size = sum(map(len, reports)) * EVENT.size
        denial = self.gate.check(Op.INPUT_INJECT, size)
        if denial is not None:
            self.stats.deny(Op.INPUT_INJECT, denial, size, started)
            raise DeniedError(
                Op.INPUT_INJECT.value,
                f"{len(events)} events for the {self.kind.name} refused: {denial.value}",
            )
        return reports

    def _admit(self, report: list[Event]) -> int:
        started = now_ns()
        dropped = self._waiting.admit(report)
        self.stats.allow(Op.INPUT_INJECT, len(report) * EVENT.size, started)
        for _ in range(dropped):
            self.stats.deny(Op.INPUT_INJECT, Denial.QUEUE_FULL, EVENT.size, started)
        self.is_dirty = True
        # At once, so that only a guest that is slow has motion merged.
        with suppress(QueueError):
            for _ in report:
                if not self._move():
                    break
        return dropped

    def _finish(self, token: int, result: int) -> None:
        self._results.remember(token, result)
        if self.run_queue(EVENT_QUEUE):
            self.run_soon(EVENT_QUEUE)
        if self.is_dirty:
            self.save()

    # -- the guest's side ----------------------------------------------------------------------------------------

    def process(self, queue: int) -> bool:
        return self.drain(queue, self._read_status) if queue == STATUS_QUEUE else self._deliver()

    def _move(self) -> bool:
        """One waiting event into one waiting buffer, not yet published; False when there is nothing to move."""
        self._is_refused = False
        chain = self.pop(EVENT_QUEUE) if self._waiting.size else None
        if chain is None:
            return False
        started = now_ns()
        vring = self.queues[EVENT_QUEUE]
        if chain.writable_bytes < EVENT.size:
            vring.chain_errors += 1
            vring.push(chain.head, 0)
            return True
        denial = self.gate.check(Op.INPUT_POLL, EVENT.size)
        if denial is not None:
            self.stats.deny(Op.INPUT_POLL, denial, EVENT.size, started)
            self._is_refused = True
            vring.unpop(chain.head)
            return False
        vring.push(chain.head, chain.write(EVENT.pack(*self._waiting.take())))
        self.stats.allow(Op.INPUT_POLL, EVENT.size, started)
        self.is_dirty = self._has_room_news = True
        return True

    def _deliver(self) -> bool:
        for _ in range(self.BUDGET):
            if self._move():
                continue
            self.commit(EVENT_QUEUE)
            if not self._waiting.size or self._is_refused or not self.queues[EVENT_QUEUE].arm():
                return False
        self.commit(EVENT_QUEUE)
        return True

    def commit(self, queue: int) -> None:
        super().commit(queue)
        if self._has_room_news:
            self._has_room_news = False
            self.on_room()

    def _read_status(self, chain: Chain) -> int:
        if chain.readable_bytes < EVENT.size:
            self.queues[STATUS_QUEUE].chain_errors += 1
        else:
            self._status(*EVENT.unpack(chain.read(EVENT.size)))
        return 0

    def _status(self, kind: int, code: int, value: int) -> None:
        """The guest's word; what the device has no part for is ignored (5.8.6.2)."""
        if kind == EventType.LED and code in self.kind.bits.get(EventType.LED, ()):
            leds = self.leds | 1 << Led(code) if value else self.leds & ~(1 << Led(code))
            if leds != self.leds:
                self.leds = leds
                self.is_dirty = True
            self.on_status(kind, code, value)

    # -- configuration space -------------------------------------------------------------------------------------

    def write_config(self, offset: int, data: bytes) -> None:
        for position, byte in enumerate(data[:2], offset):
            if position == 0:
                self._select = byte
            elif position == 1:
                self._subsel = byte

    def config_space(self) -> bytes:
        payload = self.kind.config(self._select, self._subsel, self.name)
        return (CONFIG_HEADER.pack(self._select, self._subsel, len(payload)) + payload).ljust(
            CONFIG_BYTES, b"\0"
        )

    def reset_device(self) -> None:
        self._waiting.clear()
        self._select, self._subsel = Select.UNSET, 0
        super().reset_device()
        self.on_room()

    def snapshot(self) -> dict[str, Any]:
        return {
            **super().snapshot(),
            "kind": self.kind.name,
            "has_driver": self.queues[0].attached,
            "waiting_events": self._waiting.size,
            "held": [
                *map(key_name, sorted(self._waiting.keys)),
                *(f"finger {n}" for n in sorted(self._waiting.fingers)),
            ],
            "queue_limit": self._waiting.limit,
            "leds": [led.name.lower() for led in Led if self.leds >> led & 1],
        }

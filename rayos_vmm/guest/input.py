"""One machine's keyboard, mouse, tablet and touch screen: used by a person or a program, recorded, replayed.

Events are evdev's (linux/input-event-codes.h); the worker closes each batch with SYN_REPORT. Every event on its way to
the guest, whoever sent it, passes `send`: that is where recorders listen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import msgspec
import trio

from rayos_devices.input import keymap
from rayos_vmm.config.spec import FINGERS
from rayos_vmm.errors import Conflict, Invalid, NotFound, RayosError
from rayos_vmm.guest import board_input
from rayos_vmm.guest.view import InputDevice
from rayos_vmm.machine.machine import Machine, worker_errors
from rayos_vmm.machine.recording import Held, Recording, Step
from rayos_vmm.qemu.arch import board_of

_EV_KEY, _EV_REL, _EV_ABS = 1, 2, 3
_REL_X, _REL_Y, _REL_WHEEL = 0, 1, 8
_ABS_X, _ABS_Y = 0, 1
_MT_SLOT, _MT_X, _MT_Y, _MT_TRACKING_ID = 0x2F, 0x35, 0x36, 0x39
_BTN_TOUCH: Final = 0x14A
_BUTTONS: Final = {"left": 0x110, "right": 0x111, "middle": 0x112}  # BTN_LEFT, BTN_RIGHT, BTN_MIDDLE
AXIS_MAXIMUM: Final = 32767  # of tablet and touch screen
_SLOTS: Final = 10
TEXT_MAXIMUM: Final = 65536  # characters at a time
RELEASE_TIMEOUT_S: Final = 2.0

Event = tuple[int, int, int]


class MachineInput:
    """One machine's input devices. Every method raises Conflict while the machine does not run, GuestGone when its
    devices are not there, NotFound for a device that it does not have, Invalid for what that device cannot do.
    """

    def __init__(self, machine: Machine, may: Callable[[], None] = lambda: None) -> None:
        """`may` is asked before anything goes to a device of QEMU's, as the gate is by ours; it raises if not."""
        self._machine = machine
        self._may = may

    async def devices(self) -> list[InputDevice]:
        """Each device: name, kind, lights, what is held down, what waits for the guest, what was dropped."""
        worker = self._machine.need_worker()
        with worker_errors(self._machine):
            stats = await worker.stats()
        return [
            msgspec.convert(
                {**one, "device": name, "dropped": one["denials"].get("queue_full", 0)}, InputDevice
            )
            for name, one in stats.items()
            if "leds" in one
        ]

    async def listener(self, device: str) -> str:
        """The device that a driver listens to now: "virtio" for ours, else "ps2" or "usb" for one of QEMU's.

        Our own guest has a driver for ours, which keeps what comes before it is up.

        Raises:
            NotFound: the machine has no such device.
            Conflict: it has, and nobody listens to it.
        """
        machine, spec = self._machine, self._machine.record.spec
        worker = machine.need_worker()
        with worker_errors(machine):
            ours = (await worker.stats()).get(device, {})
        if ours.get("has_driver") or (ours and spec.is_our_guest):
            return "virtio"
        if device in spec.input.usb:
            return "usb"
        if device in ("keyboard", "mouse") and board_of(spec).has_ps2:
            return "ps2"
        if ours:
            raise Conflict(
                f"{machine.name}: nobody listens to its {device}: the guest has no driver for it, or not yet",
                code="no_driver",
            )
        raise NotFound(f"{machine.name} has no {device}", code="no_such_device")

    async def send(self, device: str, events: Sequence[Event]) -> str:
        """Hands events to the device that a driver listens to; waits while its queue is full. Says which it was.

        Raises:
            NotFound, Conflict: as `listener`.
        """
        to = await self.listener(device)
        if to == "virtio":
            worker = self._machine.need_worker()
            with worker_errors(self._machine):
                await worker.inject(device, events)
        else:
            self._may()
            await board_input.send(self._machine.need_qmp(), events)
        self._machine.input_recordings.note(device, events)
        return to

    async def type_text(self, text: str, layout: str | None = None) -> str:
        """Presses and releases the keys of `text`, for a guest with this keyboard layout (None: the machine's); says
        to which keyboard they went."""
        if len(text) > TEXT_MAXIMUM:
            raise Invalid(f"{len(text)} characters to type; at most {TEXT_MAXIMUM} are allowed at a time")
        try:
            events = keymap.text_to_events(text, layout=layout or self._machine.record.spec.input.layout)
        except ValueError as error:
            raise Invalid(str(error)) from None
        return await self.send("keyboard", events)

    async def press(self, combo: str) -> str:
        """Presses the keys of `ctrl-alt-delete` in order and releases them in reverse; says on which keyboard."""
        try:
            events = keymap.combo_to_events(combo)
        except ValueError as error:
            raise Invalid(str(error)) from None
        return await self.send("keyboard", events)

    async def point(self, x: float, y: float, buttons: Sequence[str] = ()) -> None:
        """Moves the tablet to (x, y) in 0..1, with exactly these buttons held."""
        events = [(_EV_ABS, _ABS_X, _axis(x)), (_EV_ABS, _ABS_Y, _axis(y)), *_held(buttons)]
        await self.send("tablet", events)

    async def move(self, dx: int, dy: int, wheel: int = 0, buttons: Sequence[str] = ()) -> None:
        """Moves the mouse by some steps, turns its wheel, with exactly these buttons held."""
        steps = ((_REL_X, dx), (_REL_Y, dy), (_REL_WHEEL, wheel))
        moved = [(_EV_REL, axis, step) for axis, step in steps if step]
        await self.send("mouse", [*moved, *_held(buttons)])

    async def touch(self, points: Sequence[tuple[float, float]]) -> None:
        """Has exactly so many fingers on the touch screen, each where it is said (0..1); none lifts all.

        A finger keeps its number from call to call: the first point is the first finger.
        """
        if len(points) > FINGERS:
            raise Invalid(f"{len(points)} fingers; at most {FINGERS} are allowed")
        events: list[Event] = []
        for finger in range(_SLOTS):
            events.append((_EV_ABS, _MT_SLOT, finger))
            if finger < len(points):
                x, y = points[finger]
                events += [
                    (_EV_ABS, _MT_TRACKING_ID, finger),
                    (_EV_ABS, _MT_X, _axis(x)),
                    (_EV_ABS, _MT_Y, _axis(y)),
                ]
            else:
                events.append((_EV_ABS, _MT_TRACKING_ID, -1))
        await self.send("touch", [*events, (_EV_KEY, _BTN_TOUCH, int(bool(points)))])

    # -- recording -----------------------------------------------------------------------------------------------

    def check_recordable(self) -> None:
        """Raises Lagged when there are as many recorders as there may be."""
        self._machine.need_worker()
        self._machine.input_recordings.check()

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Records the events that reach the devices from now on, as a `Recording` to iterate over; it ends with the
        machine.
        """
        self.check_recordable()
        with self._machine.input_recordings.open() as recording:
            yield recording

    async def replay(self, steps: Sequence[Step], speed: float = 1.0) -> None:
        """Does again what was recorded, at the times that it says divided by `speed`; answers when it is done.

        Cancelled or failed, it releases what it holds down.
        """
        self._machine.need_worker()
        has = self._machine.record.spec.input.devices
        if unknown := [step.device for step in steps if step.device not in has]:
            raise NotFound(
                f"{self._machine.name} has no input device {unknown[0]!r}; it has {', '.join(has)}",
                code="no_such_device",
            )
        started = trio.current_time()
        held = Held()
        try:
            for step in steps:
                await trio.sleep_until(started + step.t / speed)
                held.note(step.device, step.events)
                await self.send(step.device, step.events)
        except BaseException:
            with trio.move_on_after(RELEASE_TIMEOUT_S, shield=True):
                for device, events in held.releases():
                    with suppress(RayosError):
                        await self.send(device, events)
            raise


def _axis(share: float) -> int:
    if not 0 <= share <= 1:
        raise Invalid(f"a place at {share:g}; both x and y are from 0 to 1")
    return round(share * AXIS_MAXIMUM)


def _held(buttons: Sequence[str]) -> list[Event]:
    unknown = [button for button in buttons if button not in _BUTTONS]
    if unknown:
        raise Invalid(f"button {unknown[0]!r}; allowed are {', '.join(_BUTTONS)}")
    return [(_EV_KEY, code, int(button in buttons)) for button, code in _BUTTONS.items()]

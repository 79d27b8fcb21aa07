"""What a person in front of the machine does: read and type at its consoles, press keys, point.

Key and pointer events are evdev's (linux/input-event-codes.h); the worker closes each batch with SYN_REPORT.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Final

import trio

from devices.input import keymap
from rayos_vmm.errors import GuestGone, Invalid, NotFound
from rayos_vmm.vm.machine import SERIAL_PORT, Machine
from rayos_vmm.worker.client import WorkerError, WorkerGone

_EV_KEY, _EV_ABS = 1, 3
_ABS_X, _ABS_Y = 0, 1
_BUTTONS: Final = {"left": 0x110, "right": 0x111, "middle": 0x112}  # BTN_LEFT, BTN_RIGHT, BTN_MIDDLE
POINTER_MAXIMUM: Final = 32767  # of the tablet's axes
TEXT_MAXIMUM: Final = 65536  # characters at a time


@contextmanager
def worker_errors(machine: Machine) -> Iterator[None]:
    """A worker's refusals and its absence in the service's words."""
    try:
        yield
    except WorkerError as error:
        if error.code in ("no_such_port", "no_such_device"):
            raise NotFound(f"{machine.name}: {error}", code=error.code) from None
        raise Invalid(f"{machine.name}: {error}", code=error.code) from None
    except WorkerGone as error:
        raise GuestGone(f"{machine.name}: {error}") from None


async def console_write(machine: Machine, port: int, data: bytes) -> None:
    """Types into a console port or the serial line; waits for room."""
    if port == SERIAL_PORT:
        machine.need_qmp()
        if machine.serial_stream is None:
            raise GuestGone(f"{machine.name}: its serial line is not connected")
        try:
            async with machine.serial_lock:
                await machine.serial_stream.send_all(data)
        except trio.BrokenResourceError:
            raise GuestGone(f"{machine.name}: its serial line was closed") from None
        return
    worker = machine.need_worker()
    with worker_errors(machine):
        await worker.console_write(port, data)


@asynccontextmanager
async def console_stream(
    machine: Machine, port: int, since: int | None
) -> AsyncIterator[AsyncIterator[tuple[int, bytes]]]:
    """(offset, bytes) of a port. The serial line's history is there after the end as well."""
    if port == SERIAL_PORT:
        async with aclosing(machine.serial.follow(since)) as serial:
            yield serial
        return
    worker = machine.need_worker()
    with worker_errors(machine):
        async with worker.console_stream(port, since=since) as chunks:
            async with aclosing(_until_gone(chunks)) as until_gone:
                yield until_gone


async def _until_gone(chunks: AsyncIterator[tuple[int, bytes]]) -> AsyncGenerator[tuple[int, bytes], None]:
    try:
        async for chunk in chunks:
            yield chunk
    except WorkerGone:
        return  # the machine ended: so does its console


async def type_text(machine: Machine, text: str) -> None:
    """Presses and releases the keys of `text`."""
    worker = machine.need_worker()
    if len(text) > TEXT_MAXIMUM:
        raise Invalid(f"{len(text)} characters to type; at most {TEXT_MAXIMUM} are allowed at a time")
    try:
        events = keymap.text_to_events(text, layout="us")
    except ValueError as error:
        raise Invalid(str(error)) from None
    with worker_errors(machine):
        await worker.inject("keyboard", events)


async def send_key(machine: Machine, combo: str) -> None:
    """Presses the keys of `ctrl-alt-delete` in order and releases them in reverse."""
    worker = machine.need_worker()
    try:
        events = keymap.combo_to_events(combo)
    except ValueError as error:
        raise Invalid(str(error)) from None
    with worker_errors(machine):
        await worker.inject("keyboard", events)


async def pointer(machine: Machine, x: float, y: float, buttons: Sequence[str]) -> None:
    """Moves the tablet, with exactly these buttons held."""
    worker = machine.need_worker()
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise Invalid(f"pointer at ({x}, {y}); both are from 0 to 1")
    unknown = [button for button in buttons if button not in _BUTTONS]
    if unknown:
        raise Invalid(f"button {unknown[0]!r}; allowed are {', '.join(_BUTTONS)}")
    events = [
        (_EV_ABS, _ABS_X, round(x * POINTER_MAXIMUM)),
        (_EV_ABS, _ABS_Y, round(y * POINTER_MAXIMUM)),
    ]
    events += [(_EV_KEY, code, int(button in buttons)) for button, code in _BUTTONS.items()]
    with worker_errors(machine):
        await worker.inject("tablet", events)

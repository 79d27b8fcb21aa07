"""Standard input and output of a device that is served alone: a terminal for a console, events for an input device."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from rayos_devices.errors import RequestError
from rayos_devices.loop import Loop

if TYPE_CHECKING:
    from rayos_devices.console.backend import ConsoleBackend
    from rayos_devices.input.backend import InputBackend

_CHUNK_BYTES: Final = 4096
_LINE_BYTES: Final = 64 << 10


def join_terminal(console: ConsoleBackend, loop: Loop) -> None:
    """Standard input and output are port 0. What the guest does not take yet is not read."""
    shown = 0
    rest = b""

    def show(_port: int) -> None:
        nonlocal shown
        start, data = console.read(0, shown, 1 << 20)
        shown = start + len(data)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def typed(_events: int) -> None:
        nonlocal rest
        rest = os.read(0, _CHUNK_BYTES)
        loop.unregister(0)
        give(0)

    def give(_port: int) -> None:
        nonlocal rest
        if rest:
            rest = rest[console.write(0, rest) :]
            if not rest:
                _watch_input(loop, typed)

    console.on_output = show
    console.on_room = give
    _watch_input(loop, typed)


def join_events(device: InputBackend, loop: Loop) -> None:
    """Joins an input device to standard input and output. Each line of input is a JSON array of evdev events [type,
    code, value]; the guest's own events (its lights) are such arrays on standard output. A line that is none, or has
    events that the device cannot make, is refused on standard error.
    """
    rest = b""

    def typed(_events: int) -> None:
        nonlocal rest
        data = os.read(0, _CHUNK_BYTES)
        if not data:
            loop.unregister(0)
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _inject(device, line)

    def status(kind: int, code: int, value: int) -> None:
        print(json.dumps([[kind, code, value]]), flush=True)

    device.on_status = status
    _watch_input(loop, typed)


def _inject(device: InputBackend, line: bytes) -> None:
    if not line.strip():
        return
    try:
        dropped = device.inject(
            [(int(kind), int(code), int(value)) for kind, code, value in json.loads(line)]
        )
    except (RequestError, TypeError, ValueError) as error:
        print(f"refused: {error}", file=sys.stderr, flush=True)
        return
    if dropped:
        print(f"{dropped} reports were dropped: the guest is slow", file=sys.stderr, flush=True)


def _watch_input(loop: Loop, typed: Callable[[int], None]) -> None:
    os.set_blocking(0, False)
    with suppress(PermissionError):  # a file or /dev/null cannot be polled: then nobody types
        loop.register(0, typed)

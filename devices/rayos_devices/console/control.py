"""Control messages about the ports (VIRTIO 1.3, 5.3.6.2): messages in, messages out, no queues.

The driver says DEVICE_READY, and hears of every port by PORT_ADD. It says PORT_READY for those it made, and hears what
the port is: CONSOLE_PORT, PORT_NAME, PORT_OPEN, RESIZE. From then on it says when a program opens the port and closes
it (PORT_OPEN). What it must still hear is a set of bits per port (`Todo`), never a queue: no driver can make it grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rayos_devices.console.port import ConsolePort, Todo
from rayos_devices.console.wire import CONTROL, RESIZE, ControlEvent

#: In the order in which a port's messages go out.
_MESSAGES: Final = {
    Todo.ADD: (ControlEvent.PORT_ADD, 1),
    Todo.CONSOLE: (ControlEvent.CONSOLE_PORT, 1),
    Todo.NAME: (ControlEvent.PORT_NAME, 1),
    Todo.OPEN: (ControlEvent.PORT_OPEN, 1),
    Todo.RESIZE: (ControlEvent.RESIZE, 0),
}


def hear(ports: Sequence[ConsolePort], index: int, event: int, value: int) -> bool:
    """Act on a driver's message; False for one that is none of its to send."""
    if event == ControlEvent.DEVICE_READY:
        # A driver's first word: whatever an earlier one said is void.
        for port in ports:
            port.restart(Todo.ADD if value else Todo.NOTHING)
        return True
    if index >= len(ports):
        return False
    port = ports[index]
    if event == ControlEvent.PORT_READY:
        port.restart(Todo.NOTHING)
        port.is_ready = bool(value)
        if port.is_ready:
            port.todo = Todo.OPEN
            if port.spec.name:
                port.todo |= Todo.NAME
            if port.spec.is_console:
                port.todo |= Todo.CONSOLE | (Todo.RESIZE if port.columns else Todo.NOTHING)
        return True
    if event == ControlEvent.PORT_OPEN:
        port.guest_open = bool(value)
        return True
    return False


def next_message(ports: Sequence[ConsolePort]) -> tuple[ConsolePort, Todo, bytes] | None:
    """Returns the message that the driver must hear next; the caller clears the bit of `todo` once it is sent."""
    port = next((port for port in ports if port.todo), None)
    if port is None:
        return None
    todo = next(bit for bit in _MESSAGES if bit & port.todo)
    event, value = _MESSAGES[todo]
    message = CONTROL.pack(port.index, event, value)
    if todo is Todo.NAME:
        message += port.spec.name.encode()
    elif todo is Todo.RESIZE:
        message += RESIZE.pack(port.columns, port.rows)
    return port, todo, message

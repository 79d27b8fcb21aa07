"""virtio-console on the wire (VIRTIO 1.3, 5.3): queues, configuration space, control messages."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

#: 5.3.2: port 0 has queues 0 and 1, the control queues follow, then two for every further port.
CONTROL_RX: Final = 2
CONTROL_TX: Final = 3

#: 5.3.4: cols le16, rows le16, max_nr_ports le32, emerg_wr le32.
CONFIG: Final = struct.Struct("<HHII")
EMERG_WR_OFFSET: Final = 8

#: 5.3.6.2: id le32, event le16, value le16.
CONTROL: Final = struct.Struct("<IHH")
#: 5.3.6.2, behind the message of a RESIZE: cols le16, rows le16.
RESIZE: Final = struct.Struct("<HH")


class ConsoleFeature(IntFlag):
    """5.3.3."""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1
    EMERG_WRITE = 1 << 2


class ControlEvent(IntEnum):
    """5.3.6.2."""

    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


def rx_queue(port: int) -> int:
    """The queue that carries bytes to the guest's port."""
    return 2 * port + 2 if port else 0


def tx_queue(port: int) -> int:
    """The queue that carries bytes from the guest's port."""
    return rx_queue(port) + 1


def queue_count(ports: int) -> int:
    return 2 + 2 * ports

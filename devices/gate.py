"""What a device asks before it acts, and what it counts afterwards.

A device is given a `Gate` at construction and asks it once per operation, in this order: capability, quota, then (net)
firewall. A denial carries a reason from a closed list. `devices` knows no policy: the VMM hands in a compiled one.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Protocol


class Op(Enum):
    """The operation kinds that are gated and counted (the source report's, a device each)."""

    GPU_ALLOC = "gpu.alloc"
    GPU_FREE = "gpu.free"
    GPU_RENDER = "gpu.render"
    GPU_READBACK = "gpu.readback"
    NET_TX = "net.tx"
    NET_RX = "net.rx"
    NET_CONFIG = "net.config"
    DISK_READ = "disk.read"
    DISK_WRITE = "disk.write"
    DISK_FLUSH = "disk.flush"
    DISK_FORMAT = "disk.format"
    INPUT_INJECT = "input.inject"
    INPUT_POLL = "input.poll"
    CONSOLE_WRITE = "console.write"
    CONSOLE_READ = "console.read"
    CONSOLE_RESIZE = "console.resize"


class Denial(Enum):
    """Why an operation was refused."""

    CAPABILITY = "capability"
    QUOTA = "quota"
    FIREWALL = "firewall"
    QUEUE_FULL = "queue_full"
    RATE = "rate"
    READ_ONLY = "read_only"
    INVALID = "invalid"
    IO_ERROR = "io_error"


class Gate(Protocol):
    """May this operation happen? None is yes."""

    def check(self, op: Op, size_bytes: int) -> Denial | None: ...


class OpenGate:
    """Everything may happen: a backend served alone, by its owner."""

    def check(self, op: Op, size_bytes: int) -> Denial | None:
        return None


OPEN: Final = OpenGate()

"""A port: its name, the bytes waiting for the guest, the bytes that came from it, and what the guest must be told.

Invariant: everything here beside the bytes themselves is in `pack`, and the bytes lie in shared memory at absolute
offsets (`history.py`). So a successor that unpacks the state and maps the memory *is* its predecessor.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Final

from rayos_devices.console.history import OUTPUT_RING_BYTES, ByteRing, read_back
from rayos_devices.console.marks import MARKS_BYTES, Mark, MarkRing
from rayos_devices.errors import ConfigurationError

#: Bytes that may wait for the guest to take them.
PENDING_BYTES: Final = 64 << 10
PORT_BYTES: Final = OUTPUT_RING_BYTES + PENDING_BYTES + MARKS_BYTES
MAX_NAME_BYTES: Final = 255
DEFAULT_LOG_LIMIT_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class PortSpec:
    """A port as the operator describes it.

    `log_fd` is a regular file that gets the output byte for byte, each at its absolute offset, up to
    `log_limit_bytes`; -1 keeps no log. The descriptor stays the caller's.
    """

    name: str
    is_console: bool = False
    log_fd: int = -1
    log_limit_bytes: int = DEFAULT_LOG_LIMIT_BYTES

    def check(self) -> None:
        """Raise ConfigurationError for a name that cannot be told to a guest."""
        size = len(self.name.encode())
        if size > MAX_NAME_BYTES or "\0" in self.name:
            raise ConfigurationError(
                f"port name of {size} bytes: at most {MAX_NAME_BYTES} without NUL are allowed"
            )


class Todo(IntFlag):
    """Messages that a port still owes the guest, in this order (VIRTIO 1.3, 5.3.6.2)."""

    NOTHING = 0
    ADD = 1 << 0
    CONSOLE = 1 << 1
    NAME = 1 << 2
    OPEN = 1 << 3
    RESIZE = 1 << 4


class ConsolePort:
    """One port's state. `total` bytes came out; of the bytes for the guest [`taken`, `given`) still wait.

    `is_ready`: the driver knows the port; `guest_open`: a program in the guest has it open.
    """

    __slots__ = (
        "columns",
        "given",
        "guest_open",
        "index",
        "is_ready",
        "log_errors",
        "marks",
        "marks_count",
        "output",
        "pending",
        "rows",
        "spec",
        "taken",
        "todo",
        "total",
    )

    #: total, taken, given, marks u64; columns, rows u16; is_ready, guest_open, todo u8.
    STATE: Final = struct.Struct("<QQQQHHBBB")

    def __init__(self, index: int, spec: PortSpec, memory: memoryview) -> None:
        """`memory` is PORT_BYTES that outlive us."""
        spec.check()
        self.index = index
        self.spec = spec
        self.output = ByteRing(memory[:OUTPUT_RING_BYTES])
        self.pending = ByteRing(memory[OUTPUT_RING_BYTES : OUTPUT_RING_BYTES + PENDING_BYTES])
        self.marks = MarkRing(memory[OUTPUT_RING_BYTES + PENDING_BYTES : PORT_BYTES])
        self.total = self.taken = self.given = self.marks_count = 0
        self.columns = self.rows = 0
        self.is_ready = False
        self.guest_open = False
        self.todo = Todo.NOTHING
        self.log_errors = 0

    def pack(self) -> bytes:
        return self.STATE.pack(
            self.total,
            self.taken,
            self.given,
            self.marks_count,
            self.columns,
            self.rows,
            self.is_ready,
            self.guest_open,
            self.todo,
        )

    def unpack(self, data: bytes) -> None:
        numbers = self.STATE.unpack(data)
        self.total, self.taken, self.given, self.marks_count, self.columns, self.rows = numbers[:6]
        ready, opened, todo = numbers[6:]
        self.is_ready = bool(ready)
        self.guest_open = bool(opened)
        self.todo = Todo(todo)

    # -- from the guest ------------------------------------------------------------------------------------------

    def take_output(self, buffers: list[memoryview], now_ns: int) -> None:
        """Copy the guest's bytes behind the output, at the time that it is (since the epoch); all that is looked at
        afterwards is the copy."""
        start = self.total
        self.marks_count = self.marks.store(self.marks_count, start, now_ns)
        for buffer in buffers:
            self.output.store(self.total, buffer)
            self.total += len(buffer)
        if self.spec.log_fd >= 0:
            self._log(start, min(self.total, self.spec.log_limit_bytes))

    def _log(self, start: int, end: int) -> None:
        """Absolute offsets make a repetition after a crash write the same bytes to the same place."""
        if start >= end:
            return
        try:
            for piece in self.output.pieces(start, end - start):
                while len(piece):
                    done = os.pwrite(self.spec.log_fd, piece, start)
                    start += done
                    piece = piece[done:]
        except OSError:
            self.log_errors += 1

    @property
    def log_dropped_bytes(self) -> int:
        """Bytes beyond the log's limit."""
        return max(0, self.total - self.spec.log_limit_bytes) if self.spec.log_fd >= 0 else 0

    def read(self, offset: int, limit: int) -> tuple[int, bytes]:
        return read_back(self.output, self.total, offset, limit)

    def marks_of(self, start: int, end: int, limit: int) -> list[Mark]:
        """When the bytes from `start` to `end` came (`MarkRing.between`)."""
        return self.marks.between(self.marks_count, start, end, limit)

    # -- for the guest -------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Bytes that the guest has not taken."""
        return self.given - self.taken

    def give(self, data: bytes | memoryview) -> int:
        """Take over as much of `data` as there is room for; returns how much."""
        size = min(len(data), PENDING_BYTES - self.waiting)
        self.pending.store(self.given, data[:size])
        self.given += size
        return size

    def fill(self, buffers: list[memoryview], room: int) -> int:
        """Move waiting bytes into a chain's writable buffers of `room` bytes; returns how many."""
        size = min(self.waiting, room)
        pieces = self.pending.pieces(self.taken, size)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        done = 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
            if done == size:
                break
        self.taken += size
        return size

    def restart(self, todo: Todo) -> None:
        """A driver begins, or ends: what an earlier one said of the port is void."""
        self.is_ready = False
        self.guest_open = False
        self.todo = todo

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "port": self.index,
            "name": self.spec.name,
            "is_console": self.spec.is_console,
            "guest_open": self.guest_open,
            "columns": self.columns,
            "rows": self.rows,
        }

    def snapshot(self) -> dict[str, Any]:
        """Counters, JSON-ready."""
        return {
            **self.describe(),
            "output_bytes": self.total,
            "input_bytes": self.taken,
            "waiting_bytes": self.waiting,
            "log_dropped_bytes": self.log_dropped_bytes,
            "log_errors": self.log_errors,
        }

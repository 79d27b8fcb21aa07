"""How the rings reach a port without an object per frame: buffers by address, results as the kernel gives them.

The ports of this package have a path of their own; any other `FramePort` is reached through `ViewPath`.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Protocol

from rayos_devices.native import Buffers
from rayos_devices.net.outcome import EMPTY
from rayos_devices.net.queue import FrameQueue, Inlet


class Frames(Protocol):
    """A port in Python, a call and some views a frame. `receive` and `send` never block."""

    def receive(self, buffers: list[memoryview]) -> int:
        """One frame with its header into the buffers; its bytes. Errors: BlockingIOError when there is none."""
        ...

    def send(self, buffers: list[memoryview]) -> None:
        """One frame with its header. Errors: OSError when it cannot be taken (down, malformed): it is dropped."""
        ...


class Path:
    """Takes every frame and has none: the sink."""

    def send(self, buffers: Buffers) -> int:
        """One frame with its header; the bytes taken, or minus errno: it is dropped."""
        return buffers.total

    def receive(self, buffers: Buffers) -> int:
        """One frame with its header into the buffers; its bytes, EMPTY when none waits, or minus errno."""
        return EMPTY

    def flush(self) -> None:
        """No more frames are sent for now."""

    def set_inlet(self, inlet: Inlet | None) -> None:
        """Who takes frames that would be received, as they come, where that is possible."""

    def has_frame(self) -> bool:
        """A frame waits, as far as can be seen without a system call."""
        return False

    def set_awake(self, awake: bool) -> None:
        """Whether `has_frame` is asked so often that the descriptor need not tell."""


class FilePath(Path):
    """A tap, or whatever else moves one frame a system call."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send(self, buffers: Buffers) -> int:
        return buffers.send(self.fd)

    def receive(self, buffers: Buffers) -> int:
        return buffers.receive(self.fd)


class QueuePath(Path):
    """Sends into one queue and receives from another, or from the same: an echo."""

    def __init__(self, outgoing: FrameQueue, incoming: FrameQueue) -> None:
        self.outgoing = outgoing
        self.incoming = incoming

    def send(self, buffers: Buffers) -> int:
        return self.outgoing.push(buffers)

    def flush(self) -> None:
        self.outgoing.flush()

    def set_inlet(self, inlet: Inlet | None) -> None:
        self.incoming.set_inlet(inlet)

    def receive(self, buffers: Buffers) -> int:
        size = self.incoming.pop(buffers)
        return size if size else EMPTY

    def has_frame(self) -> bool:
        return self.incoming.has_frame()

    def set_awake(self, awake: bool) -> None:
        self.incoming.set_awake(awake)


class ViewPath(Path):
    """Any port, by views of the memory that the ring has checked."""

    def __init__(self, port: Frames) -> None:
        self.port = port

    def send(self, buffers: Buffers) -> int:
        try:
            self.port.send(self._views(buffers))
        except OSError as error:
            return -(error.errno or errno.EIO)
        return buffers.total

    def receive(self, buffers: Buffers) -> int:
        try:
            return self.port.receive(self._views(buffers))
        except BlockingIOError:
            return EMPTY
        except OSError as error:
            return -(error.errno or errno.EIO)

    def _views(self, buffers: Buffers) -> list[memoryview]:
        views = []
        for index in range(buffers.count):
            address, length = buffers.at(index)
            views.append(memoryview((ctypes.c_char * length).from_address(address)).cast("B"))
        return views

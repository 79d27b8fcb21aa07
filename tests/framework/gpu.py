"""The driver's side of a GPU, and QEMU's side of its display socket.

`GpuGuest` sends commands over a `Rig`; `Monitor` is a second implementation of what QEMU's hw/display/vhost-user-gpu.c
does with the messages, and as strict: what would make QEMU leak, draw into a freed surface or lose its place fails.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple, Self

from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.gpu.commands import CONTROL, CURSOR
from rayos_devices.gpu.display import MESSAGE_BYTES
from rayos_devices.gpu.wire import (
    FLAG_FENCE,
    HEADER_BYTES,
    MEMORY_ENTRY,
    AttachBacking,
    Command,
    Format,
    Header,
    Rect,
    ResourceCreate2d,
    ResourceFlush,
    ResourceId,
    SetScanout,
    TransferToHost2d,
    UpdateCursor,
)
from rayos_devices.state import StateStore
from tests.framework.guest_memory import GuestRam
from tests.framework.target import Rig, Stepped

OK: Final = 0x1100
CONTROL_QUEUE_SIZE: Final = 64


class Reply(NamedTuple):
    """An answer: its type, its header and what follows that."""

    kind: int
    header: Header
    body: bytes


class GpuGuest:
    """A guest with one GPU. `crash` replaces the backend as the keeper does after kill -9: only memfds are left."""

    def __init__(
        self,
        *,
        ram_bytes: int = 8 << 20,
        width: int = 64,
        height: int = 48,
        scanouts: int = 1,
        modes: Sequence[tuple[int, int]] = (),
        quota_bytes: int = 1 << 20,
        features: int | None = None,
    ) -> None:
        self.options = {
            "width": width,
            "height": height,
            "scanouts": scanouts,
            "modes": modes,
            "quota_bytes": quota_bytes,
        }
        self.heap_fd = os.memfd_create("gpu-heap", os.MFD_CLOEXEC)
        self.state_fd = os.memfd_create("gpu-state", os.MFD_CLOEXEC)
        self.target = Stepped(self._make)
        self._corpses: list[Stepped[GpuBackend]] = []
        self.rig = Rig(self.target, 2, size=CONTROL_QUEUE_SIZE, ram=GuestRam(ram_bytes), features=features)
        self.fence = 0

    def _make(self, loop: object) -> GpuBackend:
        state = StateStore(self.state_fd, GpuBackend.STATE_BYTES)
        return GpuBackend("gpu", loop, heap_fd=self.heap_fd, state=state, **self.options)  # type: ignore[arg-type]

    @property
    def backend(self) -> GpuBackend:
        return self.target.backend

    def heap_blocks(self) -> int:
        """Returns the memory that the host really gave for pixels, in blocks of 512 bytes."""
        return os.fstat(self.heap_fd).st_blocks

    def check_session(self) -> None:
        """Errors: AssertionError when the device dropped its frontend."""
        assert self.target.reasons == []

    @property
    def ram(self) -> GuestRam:
        return self.rig.ram

    def keep(self) -> None:
        """Guest memory allocated so far stays when later commands free theirs."""
        self.rig.heap = self.ram.allocate(0)

    def crash(self, queues: Sequence[int] = (CONTROL, CURSOR)) -> None:
        """Abandon the backend as it is, and resume the session with a successor, its queues in this order."""
        self._corpses.append(self.target)
        self.target = Stepped(self._make, resume=True)
        self.rig.target = self.target
        self.rig.frontend.close()
        self.rig.frontend = self.target.connect()
        self.rig.frontend.negotiate()
        self.rig.frontend.set_memory(self.ram)
        for index in queues:
            self.rig.frontend.start(index, self.rig.queues[index])

    def close(self) -> None:
        for corpse in self._corpses:
            # Its queues must not see the rings again: only descriptors are given back.
            corpse.backend.screen.display.detach()
            for queue in corpse.backend.queues:
                queue.stop()
            corpse.backend.reset = lambda: None  # type: ignore[method-assign]
            corpse.close()
        self.rig.frontend.close()
        self.target.settle()
        self.target.close()
        for driver in self.rig.queues:
            driver.close()
        self.ram.close()
        os.close(self.heap_fd)
        os.close(self.state_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- commands ------------------------------------------------------------------------------------------------

    def raw(self, data: bytes, room: int = HEADER_BYTES, *, queue: int = CONTROL) -> bytes:
        """Any bytes as a command; what was written."""
        return self.rig.request(data, room, index=queue)

    def command(self, kind: int, body: bytes = b"", room: int = HEADER_BYTES) -> Reply:
        """A fenced command on the control queue; its fence must come back."""
        self.fence += 1
        answer = self.raw(Header(kind, FLAG_FENCE, self.fence).pack() + body, room)
        header = Header.unpack(answer)
        assert (header.flags, header.fence_id) == (FLAG_FENCE, self.fence)
        return Reply(header.kind, header, answer[HEADER_BYTES:])

    def create(self, resource_id: int, width: int, height: int, format_: int = Format.B8G8R8X8) -> int:
        body = ResourceCreate2d(resource_id, format_, width, height).pack()
        return self.command(Command.RESOURCE_CREATE_2D, body).kind

    def attach(self, resource_id: int, entries: Sequence[tuple[int, int]]) -> int:
        body = AttachBacking(resource_id, len(entries)).pack() + pack_entries(entries)
        return self.command(Command.RESOURCE_ATTACH_BACKING, body).kind

    def detach(self, resource_id: int) -> int:
        return self.command(Command.RESOURCE_DETACH_BACKING, ResourceId(resource_id).pack()).kind

    def unref(self, resource_id: int) -> int:
        return self.command(Command.RESOURCE_UNREF, ResourceId(resource_id).pack()).kind

    def transfer(self, resource_id: int, rect: Rect, offset: int = 0) -> int:
        body = TransferToHost2d(rect, offset, resource_id).pack()
        return self.command(Command.TRANSFER_TO_HOST_2D, body).kind

    def set_scanout(self, scanout: int, resource_id: int, rect: Rect) -> int:
        return self.command(Command.SET_SCANOUT, SetScanout(rect, scanout, resource_id).pack()).kind

    def flush(self, resource_id: int, rect: Rect) -> int:
        return self.command(Command.RESOURCE_FLUSH, ResourceFlush(rect, resource_id).pack()).kind

    def cursor(self, kind: Command, cursor: UpdateCursor) -> int:
        """A cursor command with room for an answer."""
        return Header.unpack(self.raw(Header(kind).pack() + cursor.pack(), HEADER_BYTES, queue=CURSOR)).kind

    def show(self, resource_id: int, width: int, height: int, format_: int = Format.B8G8R8X8) -> int:
        """A resource with a backing of its own on scanout 0; returns the backing's guest address."""
        backing = self.ram.allocate(width * height * 4, 4096)
        self.keep()
        assert self.create(resource_id, width, height, format_) == OK
        assert self.attach(resource_id, [(backing, width * height * 4)]) == OK
        assert self.set_scanout(0, resource_id, Rect(0, 0, width, height)) == OK
        return backing

    def draw(self, resource_id: int, rect: Rect, pixels: bytes, backing: int, stride: int) -> None:
        """Store `pixels` into the backing, row by row, transfer and flush them."""
        row = rect.width * 4
        for y in range(rect.height):
            at = backing + (rect.y + y) * stride + rect.x * 4
            self.ram.write(at, pixels[y * row : (y + 1) * row])
        assert self.transfer(resource_id, rect, rect.y * stride + rect.x * 4) == OK
        assert self.flush(resource_id, rect) == OK

    def monitor(self) -> Monitor:
        """Plug in a new display."""
        monitor, fd = Monitor.open()
        assert self.backend.take_gpu_socket(fd)
        return monitor


def pack_entries(entries: Sequence[tuple[int, int]]) -> bytes:
    return b"".join(MEMORY_ENTRY.pack(*entry) for entry in entries)


class Monitor:
    """QEMU's end of the display socket: one surface a scanout (BGRX rows), the cursor, and its demands."""

    _HEADER = struct.Struct("<III")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.surfaces: dict[int, tuple[int, int, bytearray] | None] = {}
        self.cursors: dict[int, tuple[int, int, bool]] = {}
        self.shapes: dict[int, tuple[int, int, bytes]] = {}
        self.messages = 0
        self._unshown: set[int] = set()
        self._data = bytearray()

    @classmethod
    def open(cls) -> tuple[Monitor, int]:
        """The monitor, and the descriptor for the device."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        return cls(ours), theirs.detach()

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, limit: int | None = None) -> int:
        """Act on what has arrived (at most `limit` bytes of it); returns the bytes read."""
        total = 0
        while limit is None or total < limit:
            try:
                data = self.sock.recv(1 << 16 if limit is None else limit - total)
            except BlockingIOError:
                break
            if not data:
                break
            total += len(data)
            self._data += data
        while len(self._data) >= 12:
            request, flags, size = self._HEADER.unpack_from(self._data)
            assert flags == 0 and 12 + size <= MESSAGE_BYTES
            if len(self._data) < 12 + size:
                break
            self._act(request, bytes(self._data[12 : 12 + size]))
            del self._data[: 12 + size]
            self.messages += 1
        return total

    @property
    def is_partial(self) -> bool:
        """Half a message is here."""
        return bool(self._data)

    def follow(self, guest: GpuGuest) -> None:
        """Read until the device has nothing to send."""
        while True:
            guest.rig.settle()
            if not self.read():
                return

    def _act(self, request: int, payload: bytes) -> None:
        if request == 7:
            index, width, height = struct.unpack("<III", payload)
            assert index not in self._unshown, "a surface that was never shown is leaked"
            if width:
                self.surfaces[index] = (width, height, bytearray(width * height * 4))
                self._unshown.add(index)
            else:
                self.surfaces[index] = None
        elif request == 8:
            index, x, y, width, height = struct.unpack_from("<IIIII", payload)
            surface = self.surfaces[index]
            assert surface is not None, "drawn into a surface that is gone"
            self._unshown.discard(index)
            across, down, pixels = surface
            assert width and height and x + width <= across and y + height <= down
            assert len(payload) == 20 + width * height * 4
            for row in range(height):
                at = ((y + row) * across + x) * 4
                pixels[at : at + width * 4] = payload[20 + row * width * 4 : 20 + (row + 1) * width * 4]
        elif request in (4, 5):
            index, x, y = struct.unpack("<III", payload)
            self.cursors[index] = (x, y, request == 4)
        else:
            assert request == 6, request
            index, x, y, hot_x, hot_y = struct.unpack_from("<IIIII", payload)
            assert len(payload) == 20 + 64 * 64 * 4
            self.cursors[index] = (x, y, True)
            self.shapes[index] = (hot_x, hot_y, payload[20:])

    def picture(self, index: int = 0) -> bytes | None:
        """The pixels shown; None while it is off."""
        surface = self.surfaces[index]
        return None if surface is None else bytes(surface[2])

"""The vhost-user-gpu socket: pictures and cursor to QEMU (QEMU, docs/interop/vhost-user-gpu.rst).

QEMU needs no negotiation and we ask it nothing, so the socket is written only; whatever comes back is read and dropped.

Invariants, so that kill -9 at any instruction leaves a socket on which a successor goes on:
* A message leaves whole: in one sendmsg of at most MESSAGE_BYTES, and only after poll said writable. A unix stream
  socket is writable while at least three quarters of its send buffer (208 KiB) are free, and takes it in one call.
* QEMU keeps the surface that SCANOUT made until its first UPDATE. So both go in one call, none is leaked, and no
  UPDATE ever follows a SCANOUT of size 0 (QEMU would draw into a surface that it has freed).
Theory of operation: a head (scanout) has the rectangle that is being sent in strips of rows and the one that was
damaged meanwhile. The pixels are read when their strip is sent, so a slow QEMU sees fewer, newer frames, and memory
is bounded.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any, Final

from rayos_devices.errors import ProtocolError
from rayos_devices.gpu.scanout import Scanout
from rayos_devices.gpu.wire import PIXEL_BYTES, Rect
from rayos_devices.loop import READ, WRITE, Loop

MESSAGE_BYTES: Final = 96 * 1024
#: Room for the headers of a SCANOUT and an UPDATE in one call.
_OVERHEAD_BYTES: Final = 64
#: Pieces one sendmsg takes are limited (IOV_MAX, 1024).
_MAX_ROWS: Final = 1000
#: Messages of one turn, before the queues have theirs.
_TURN: Final = 16

_HEADER: Final = struct.Struct("<III")
_SCANOUT: Final = struct.Struct("<III")
_UPDATE: Final = struct.Struct("<IIIII")
_CURSOR_POS: Final = struct.Struct("<III")
_CURSOR_HOT: Final = struct.Struct("<II")


class DisplayRequest(IntEnum):
    """*Communication*, the requests that are sent here."""

    CURSOR_POS = 4
    CURSOR_POS_HIDE = 5
    CURSOR_UPDATE = 6
    SCANOUT = 7
    UPDATE = 8


Pieces = list["bytes | memoryview"]


class _Head:
    """The part of one scanout that QEMU has, and the part that it lacks."""

    __slots__ = ("has_cursor_moved", "has_new_cursor", "is_changed", "pending", "sending", "size")

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Nothing is known of what QEMU shows."""
        self.size: tuple[int, int] | None = None
        self.is_changed = True
        self.sending: Rect | None = None
        self.pending: Rect | None = None
        self.has_new_cursor = self.has_cursor_moved = False


class Display:
    """Keeps QEMU's consoles up to date with `scanouts`, whose pixels lie in `pixels` (the heap)."""

    def __init__(self, loop: Loop, pixels: memoryview, scanouts: Sequence[Scanout]) -> None:
        self._loop = loop
        self._pixels = pixels
        self._scanouts = scanouts
        self._heads = [_Head() for _ in scanouts]
        self._turn = 0
        self._socket: socket.socket | None = None
        self._poll = select.poll()
        self._is_waiting = False
        self.error = ""
        self.messages = 0
        self.sent_bytes = 0

    def attach(self, fd: int) -> None:
        """Take over the socket, instead of the one before, and show everything there.

        Errors: ProtocolError when it is no unix stream socket; `fd` stays the caller's then.
        """
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ProtocolError("GPU_SET_SOCKET with a descriptor that is no socket")
        sock = socket.socket(fileno=fd)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            sock.detach()
            raise ProtocolError("GPU_SET_SOCKET with a socket that is no unix stream socket")
        self.detach()
        sock.setblocking(False)
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self.error = ""
        for head, scanout in zip(self._heads, self._scanouts, strict=True):
            head.start()
            head.has_new_cursor = scanout.is_cursor_shown
        self._is_waiting = True
        self._loop.register(fd, self._ready, READ | WRITE)

    def detach(self) -> None:
        """Close the socket; pictures are kept for the next one."""
        if self._socket is not None:
            self._loop.unregister(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def change(self, index: int) -> None:
        """A scanout was switched on, off or to another picture."""
        self._heads[index].is_changed = True
        self._wake()

    def damage(self, index: int, rect: Rect) -> None:
        """The pixels in `rect`, relative to the scanout and inside it, are new."""
        head = self._heads[index]
        head.pending = rect if head.pending is None else head.pending.union(rect)
        self._wake()

    def move_cursor(self, index: int, *, is_new: bool) -> None:
        """The cursor has another place, and when `is_new` another shape, or is hidden."""
        head = self._heads[index]
        head.has_cursor_moved = True
        head.has_new_cursor |= is_new
        self._wake()

    @property
    def is_connected(self) -> bool:
        return self._socket is not None

    def snapshot(self) -> dict[str, Any]:
        """Counters, JSON-ready."""
        return {
            "connected": self.is_connected,
            "error": self.error,
            "messages": self.messages,
            "bytes": self.sent_bytes,
        }

    # -- sending -------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._socket is not None and not self._is_waiting:
            self._is_waiting = True
            self._loop.modify(self._socket.fileno(), READ | WRITE)

    def _ready(self, events: int) -> None:
        sock = self._socket
        if sock is None:
            return
        try:
            if events & ~WRITE and not self._drain(sock):
                self.detach()
            elif events & WRITE:
                self._pump(sock)
        except ConnectionError:
            self.detach()  # QEMU closes the socket whenever the device stops, and brings a new one

    @staticmethod
    def _drain(sock: socket.socket) -> bool:
        """Drop what QEMU sent; False when it closed."""
        with suppress(BlockingIOError):
            return bool(sock.recv(65536))
        return True

    def _pump(self, sock: socket.socket) -> None:
        for _ in range(_TURN):
            if not self._poll.poll(0):
                return
            pieces = self._next()
            if pieces is None:
                self._is_waiting = False
                self._loop.modify(sock.fileno(), READ)
                return
            total = sum(map(len, pieces))
            try:
                sent = sock.sendmsg(pieces, (), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            if sent != total:
                self.error = f"the display socket took {sent} of {total} bytes; it is given up"
                self.detach()
                return
            self.messages += 1
            self.sent_bytes += total

    def _next(self) -> Pieces | None:
        """Returns the next message, each scanout in its turn; None when QEMU has everything."""
        for _ in self._heads:
            self._turn = (self._turn + 1) % len(self._heads)
            pieces = self._next_of(self._heads[self._turn], self._scanouts[self._turn])
            if pieces:
                return pieces
        return None

    def _next_of(self, head: _Head, scanout: Scanout) -> Pieces | None:
        before: Pieces = []
        if head.is_changed:
            head.is_changed = False
            size = (scanout.rect.width, scanout.rect.height)
            if size != head.size:
                before.append(_pack(DisplayRequest.SCANOUT, _SCANOUT.pack(scanout.index, *size)))
                head.size = size
            head.sending = None
            head.pending = Rect(0, 0, *size) if scanout.resource is not None else None
        elif head.has_new_cursor or head.has_cursor_moved:
            return self._cursor(head, scanout)
        if head.sending is None:
            head.sending, head.pending = head.pending, None
        rect = head.sending
        if rect is None:
            return before or None
        row_bytes = rect.width * PIXEL_BYTES
        rows = min(rect.height, _MAX_ROWS, (MESSAGE_BYTES - _OVERHEAD_BYTES) // row_bytes)
        strip = Rect(rect.x, rect.y, rect.width, rows)
        head.sending = (
            Rect(rect.x, rect.y + rows, rect.width, rect.height - rows) if rows < rect.height else None
        )
        head_bytes = _HEADER.pack(DisplayRequest.UPDATE, 0, _UPDATE.size + rows * row_bytes)
        return [*before, head_bytes + _UPDATE.pack(scanout.index, *strip), *scanout.rows(self._pixels, strip)]

    def _cursor(self, head: _Head, scanout: Scanout) -> Pieces:
        is_new, head.has_new_cursor, head.has_cursor_moved = head.has_new_cursor, False, False
        position = _CURSOR_POS.pack(scanout.index, scanout.cursor_x, scanout.cursor_y)
        if not scanout.is_cursor_shown:
            return [_pack(DisplayRequest.CURSOR_POS_HIDE, position)]
        if is_new and scanout.cursor_pixels:
            hot = _CURSOR_HOT.pack(scanout.hot_x, scanout.hot_y)
            return [_pack(DisplayRequest.CURSOR_UPDATE, position + hot + scanout.cursor_pixels)]
        return [_pack(DisplayRequest.CURSOR_POS, position)]


def _pack(request: DisplayRequest, payload: bytes) -> bytes:
    return _HEADER.pack(request, 0, len(payload)) + payload

"""The block device for a guest without our driver: a controller that QEMU emulates reads it from here over NBD.

Each request of the connection goes through the device's own ring, as a driver's would (`virtio/local.py`). What was
answered is on the image, so a worker may be killed at any time: QEMU connects to its successor and asks again for what
it had no answer to.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Iterator
from typing import Final

from rayos_devices.blk.backend import BlkBackend
from rayos_devices.blk.nbd_session import Export, NbdSession, Request
from rayos_devices.blk.nbd_wire import Command, CommandFlag, Error
from rayos_devices.blk.wire import (
    HEADER,
    SECTOR_BYTES,
    SEGMENT,
    SEGMENT_FLAG_UNMAP,
    BlkFeature,
    RequestType,
    Status,
)
from rayos_devices.errors import ProtocolError
from rayos_devices.loop import READ, WRITE, Loop
from rayos_devices.virtio.features import Feature
from rayos_devices.virtio.local import LocalMemory, LocalQueue, ring_bytes

log = logging.getLogger(__name__)

#: Requests of the ring at a time, and the data of one; a larger one of NBD's is several.
SLOTS: Final = 16
PART_BYTES: Final = 512 << 10
#: Header, data, status.
_DESCRIPTORS: Final = 3
_RING: Final = 64
#: Bytes of this process's memory that the device takes.
MEMORY_BYTES: Final = SLOTS * (PART_BYTES + 4096) + ring_bytes(_RING)
#: Above either nothing more is read from the connection.
MAX_OPERATIONS: Final = 64
MAX_OUTPUT_BYTES: Final = 64 << 20
_CHUNK_BYTES: Final = 256 << 10
#: Of one discard: its count of sectors is 32 bits, and the device takes 1 GiB.
_SEGMENT_BYTES: Final = 1 << 30

_TYPES: Final = {
    Command.READ: RequestType.IN,
    Command.WRITE: RequestType.OUT,
    Command.FLUSH: RequestType.FLUSH,
    Command.TRIM: RequestType.DISCARD,
    Command.WRITE_ZEROES: RequestType.WRITE_ZEROES,
}
_WANTED: Final = BlkFeature.FLUSH | BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES | Feature.VERSION_1


class _Operation:
    """A request of NBD's: the parts that are not begun, and how many are on their way."""

    def __init__(self, session: NbdSession, request: Request) -> None:
        self.session = session
        self.request = request
        self.parts = self._cut()
        self.is_begun = False  # every part is on its way, or over
        self.on_their_way = 0
        self.error = Error.OK
        self.data = bytearray(request.length if request.command is Command.READ else 0)

    def _cut(self) -> Iterator[tuple[RequestType, int, int]]:
        """Type, first byte of the request's data, and bytes of each part."""
        request = self.request
        step = PART_BYTES if request.command in (Command.READ, Command.WRITE) else max(request.length, 1)
        for start in range(0, max(request.length, 1), step):
            yield _TYPES[request.command], start, min(step, request.length - start)
        if request.flags & CommandFlag.FUA and request.command is not Command.READ:
            yield RequestType.FLUSH, 0, 0


class NbdPort:
    """Serves `backend`, a disk of one queue, on a listening socket, to one client at a time; the socket stays the
    caller's."""

    def __init__(self, backend: BlkBackend, listening: socket.socket, loop: Loop) -> None:
        self._backend = backend
        self._listening = listening
        self._loop = loop
        self._sock: socket.socket | None = None
        self._session: NbdSession | None = None
        self._pending = memoryview(b"")
        self._waiting: deque[_Operation] = deque()
        self._count = 0  # operations of any connection that are not over
        memory = LocalMemory(MEMORY_BYTES)
        backend.set_features(backend.features & int(_WANTED))
        self._slots = [self._make_slot(memory, index) for index in range(SLOTS)]
        self._free = list(range(SLOTS))
        self._busy: dict[int, tuple[_Operation, RequestType, int, int]] = {}
        self._queue = LocalQueue(backend, 0, memory, _RING, self._used)
        listening.setblocking(False)
        loop.register(listening.fileno(), self._accept)

    def _make_slot(self, memory: LocalMemory, index: int) -> _Slot:
        data = memory.allocate(PART_BYTES, 4096)
        return _Slot(_DESCRIPTORS * index, memory.allocate(HEADER.size), data, memory.allocate(1), memory)

    # -- the connection ------------------------------------------------------------------------------------------

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        self.disconnect()  # who connects again has given its former connection up
        sock.setblocking(False)
        store = self._backend.store
        self._sock = sock
        self._session = NbdSession(Export(store.size_bytes, store.read_only))
        self._loop.register(sock.fileno(), self._ready)
        self._send()

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._send()
        if events & ~WRITE:
            self._receive()

    def _receive(self) -> None:
        session, sock = self._session, self._sock
        if session is None or sock is None:
            return
        try:
            data = sock.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.disconnect()
            return
        try:
            requests = session.receive(data)
        except ProtocolError as error:
            log.warning("the reader of %s broke NBD and was dropped: %s", self._backend.name, error)
            self.disconnect()
            return
        for request in requests:
            self._count += 1
            self._waiting.append(_Operation(session, request))
        self._begin()
        self._send()
        if session.is_over and not self._count:
            self.disconnect()

    def _send(self) -> None:
        """As much as the socket takes; the rest when it is writable again."""
        sock, session = self._sock, self._session
        if sock is None or session is None:
            return
        while len(self._pending) or session.output_bytes:
            if not len(self._pending):
                self._pending = memoryview(session.take_output())
            try:
                self._pending = self._pending[sock.send(self._pending, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                break
            except OSError:
                self.disconnect()
                return
        is_full = self._count >= MAX_OPERATIONS or session.output_bytes > MAX_OUTPUT_BYTES
        is_blocked = len(self._pending) > 0
        self._loop.modify(sock.fileno(), (0 if is_full else READ) | (WRITE if is_blocked else 0))

    def disconnect(self) -> None:
        """Drops the connection, if there is one. What it began goes to its end, and nobody is told."""
        if self._sock is None:
            return
        self._loop.unregister(self._sock.fileno())
        self._sock.close()
        self._sock = self._session = None
        self._pending = memoryview(b"")
        kept = [one for one in self._waiting if one.on_their_way]
        self._count -= len(self._waiting) - len(kept)
        for one in kept:
            one.is_begun = True
        self._waiting.clear()

    # -- the ring ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Puts parts of what waits into free slots, the oldest first."""
        is_new = bool(self._waiting and self._free)
        while self._waiting and self._free:
            operation = self._waiting[0]
            part = None if operation.error else next(operation.parts, None)
            if part is None:
                operation.is_begun = True
                self._waiting.popleft()
                self._end(operation)
                continue
            slot = self._free.pop()
            kind, start, length = part
            self._busy[self._slots[slot].head] = operation, kind, start, length
            operation.on_their_way += 1
            buffers = self._slots[slot].fill(kind, operation.request, start, length)
            self._queue.lay_out(self._slots[slot].head, buffers)
            self._queue.offer(self._slots[slot].head)
        if is_new:
            self._queue.kick()

    def _used(self) -> None:
        for head, _ in self._queue.take_used():
            operation, kind, start, length = self._busy.pop(head)
            slot = self._slots[head // _DESCRIPTORS]
            status = slot.status
            if status != Status.OK and operation.error is Error.OK:
                operation.error = Error.EINVAL if status == Status.UNSUPP else Error.EIO
            elif kind is RequestType.IN:
                operation.data[start : start + length] = slot.data[:length]
            self._free.append(head // _DESCRIPTORS)
            operation.on_their_way -= 1
            self._end(operation)
        self._begin()
        self._send()

    def _end(self, operation: _Operation) -> None:
        """Answers an operation when all of it is over."""
        if not operation.is_begun or operation.on_their_way:
            return
        self._count -= 1
        if operation.session is self._session:
            data = b"" if operation.error else operation.data
            operation.session.reply(operation.request.cookie, operation.error, data)

    def close(self) -> None:
        """Serves no more; the listening socket stays open."""
        self.disconnect()
        self._queue.close()
        self._loop.unregister(self._listening.fileno())


class _Slot:
    """The memory of one chain: header, data, status."""

    def __init__(self, head: int, header: int, data: int, status: int, memory: LocalMemory) -> None:
        self.head = head
        self._addresses = header, data, status
        self._header = memory.view(header, HEADER.size)
        self.data = memory.view(data, PART_BYTES)
        self._status = memory.view(status, 1)

    @property
    def status(self) -> int:
        """The device's answer."""
        return self._status[0]

    def fill(
        self, kind: RequestType, request: Request, start: int, length: int
    ) -> list[tuple[int, int, bool]]:
        """Writes a part of a request; its buffers."""
        header, data, status = self._addresses
        is_format = kind in (RequestType.DISCARD, RequestType.WRITE_ZEROES)
        sector = 0 if is_format else (request.offset + start) // SECTOR_BYTES
        self._header[:] = HEADER.pack(kind, 0, sector)
        self._status[0] = Status.IOERR
        if kind is RequestType.FLUSH:
            return [(header, HEADER.size, False), (status, 1, True)]
        if kind is RequestType.OUT:
            self.data[:length] = request.data[start : start + length]
        elif is_format:
            length = self._fill_segments(kind, request)
        return [(header, HEADER.size, False), (data, length, kind is RequestType.IN), (status, 1, True)]

    def _fill_segments(self, kind: RequestType, request: Request) -> int:
        is_hole = kind is RequestType.WRITE_ZEROES and not request.flags & CommandFlag.NO_HOLE
        end = request.offset + request.length
        at = 0
        for offset in range(request.offset, end, _SEGMENT_BYTES):
            size = min(_SEGMENT_BYTES, end - offset)
            flags = SEGMENT_FLAG_UNMAP if is_hole else 0
            SEGMENT.pack_into(self.data, at, offset // SECTOR_BYTES, size // SECTOR_BYTES, flags)
            at += SEGMENT.size
        return at

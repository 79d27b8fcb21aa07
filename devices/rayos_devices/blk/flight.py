"""Requests on their way to the disk: started in ring order, ended in any, and told to the driver in ring order again.

The reorder buffer. Requests go to io_uring, so the loop never waits for a disk, and the disk ends them as it likes. The
used ring however stays in avail order: a request that is done waits here until all before it are. So the used index
counts exactly the requests that are over, and after kill -9 a successor starts from it: it does again what was not
told, and nothing that was (all that the ring remembers of requests in flight is an index, not a set). The price is
that a fast request may wait for a slow one of the same queue.

A FLUSH is a barrier without a stop: it is started when every request before it is over, while those behind go on.
Without io_uring everything here is done at once, by the calling thread.
"""

from __future__ import annotations

import errno
from typing import Any, Final, cast

from rayos_devices.blk.kinds import FORMAT, OVER, READ, SYNC, WRITE
from rayos_devices.blk.store import FULL, RawStore
from rayos_devices.bucket import Limiter
from rayos_devices.gate import Op
from rayos_devices.native import Buffers, now_ns
from rayos_devices.stats import Stats
from rayos_devices.uring import FSYNC_DATASYNC, OP_FALLOCATE, OP_FSYNC, OP_READV, OP_WRITEV, Uring
from rayos_devices.virtio.layout import MAX_QUEUE_SIZE
from rayos_devices.virtio.memory import Region
from rayos_devices.virtio.vring import Vring

#: linux/fs.h: a write returns when it is durable.
RWF_DSYNC: Final = 0x2

STATUS_OK: Final = 0
STATUS_IOERR: Final = 1

SLOT_MASK: Final = MAX_QUEUE_SIZE - 1
SLOT_BITS: Final = 10
#: More segments than this on their way, and a discard is done at once.
MAX_FORMATS: Final = 512

OPS: Final = (Op.DISK_READ, Op.DISK_WRITE, Op.DISK_FLUSH, Op.DISK_FORMAT)
_AGAIN: Final = (-errno.EINTR, -errno.EAGAIN)

_NO_REGION = cast("Region", None)


class DiskRequest:
    """One of them. `waiting` counts completions that are still to come; `error` is an errno, 0 when all is well.

    `growth` is how many bytes of storage it may take. `is_durable`: it is over only when it survives a power cut.
    `started` is 0 when it is not sampled; `gated` and `passed` are what gate and quota took then, in ns.
    """

    def __init__(self) -> None:
        self.buffers = Buffers()
        self.forget()

    def forget(self) -> None:
        """Let go of guest memory."""
        self.kind = OVER
        self.head = 0
        self.written = 0
        self.offset = 0
        self.length = 0
        self.growth = 0
        self.started = 0
        self.gated = 0
        self.passed = 0
        self.waiting = 0
        self.error = 0
        self.status_at = 0
        self.is_durable = False
        self.is_syncing = False
        self.region = _NO_REGION
        self.segments: Any = None
        self.buffers.clear()


_NO_REQUEST = cast("DiskRequest", None)


class Flight:
    """The requests of one queue, from the first that is not over; `in_flight` counts them, `limiter` those of all
    queues."""

    def __init__(
        self, vring: Vring, store: RawStore, stats: Stats, limiter: Limiter, uring: Uring | None
    ) -> None:
        self.vring = vring
        self.limiter = limiter
        self.store = store
        self.fd = store.fd
        self.stats = stats
        self.uring = cast("Uring", uring)
        self.is_async = uring is not None
        self.requests = [_NO_REQUEST] * MAX_QUEUE_SIZE
        self._pool: list[DiskRequest] = []
        self._first = 0
        self._next = 0
        self.in_flight = 0
        #: Storage that those in flight may still take.
        self.growth = 0

    def claim(self) -> DiskRequest:
        """A fresh request, to be filled and given to `add`, or back by `release`."""
        return self._pool.pop() if self._pool else DiskRequest()

    def release(self, request: DiskRequest) -> None:
        request.forget()
        self._pool.append(request)

    def add(self, request: DiskRequest) -> None:
        """Put `request` behind the others, and start it unless it is over or has failed already."""
        slot = self._next & SLOT_MASK
        self.requests[slot] = request
        self._next += 1
        self.in_flight += 1
        self.limiter.busy += 1
        self.growth += request.growth
        if request.error:
            return
        if request.kind == READ or request.kind == WRITE:
            request.waiting = 1
            if self.is_async:
                self._start(slot, request)
            else:
                self._transfer(request)
        elif request.kind == FORMAT:
            self._format(slot, request)

    def _start(self, slot: int, request: DiskRequest) -> None:
        uring = self.uring
        operation = OP_READV if request.kind == READ else OP_WRITEV
        done = request.length - request.buffers.total
        buffers = request.buffers
        flags = RWF_DSYNC if request.is_durable and operation == OP_WRITEV else 0
        uring.prepare(operation, self.fd, request.offset + done, buffers.address, buffers.count, flags, slot)

    def _transfer(self, request: DiskRequest) -> None:
        """Without io_uring: read or write all of it now."""
        while request.waiting:
            done = request.length - request.buffers.total
            if request.kind == READ:
                result = request.buffers.read(self.fd, request.offset + done, 0)
            else:
                flags = RWF_DSYNC if request.is_durable else 0
                result = request.buffers.write(self.fd, request.offset + done, flags)
            self._went_on(request, result)

    def _went_on(self, request: DiskRequest, result: int) -> None:
        """A read or write came back with `result`; `waiting` stays up when there is more to do."""
        if result > 0:
            request.buffers.advance(result)
            if request.buffers.total == 0:
                request.waiting = 0
        elif (
            result == 0
            and request.kind == READ
            and self.store.is_tail(request.offset + request.length - request.buffers.total)
        ):
            self.store.fill_tail(request.buffers)
            request.waiting = 0
        elif result not in _AGAIN:
            # Nothing read: the image ends here, it was truncated under us. Nothing written: no file system says so.
            request.error = -result if result < 0 else errno.EIO
            request.waiting = 0
            if request.is_durable and request.kind == WRITE and request.error not in FULL:
                # It was a sync as well, and a later one would not hear of this failure again.
                self.store.is_failed = True

    def _format(self, slot: int, request: DiskRequest) -> None:
        for index, (mode, offset, length) in enumerate(request.segments):
            if self.is_async and self.uring.in_flight < MAX_FORMATS:
                request.waiting += 1
                self.uring.prepare(OP_FALLOCATE, self.fd, offset, length, mode, 0, slot | index << SLOT_BITS)
            else:
                self._format_now(request, mode, offset, length)

    def _format_now(self, request: DiskRequest, mode: int, offset: int, length: int) -> None:
        try:
            self.store.fallocate(mode, offset, length)
        except OSError as error:
            request.error = error.errno or errno.EIO

    def _sync(self, slot: int, request: DiskRequest) -> None:
        request.waiting = 1
        request.is_syncing = True
        if self.is_async and not (self.store.is_failed or self.store.is_unsafe):
            self.uring.prepare(OP_FSYNC, self.fd, 0, 0, 0, FSYNC_DATASYNC, slot)
            self.uring.submit()
            return
        try:
            self.store.sync()
        except OSError as error:
            request.error = error.errno or errno.EIO
        request.waiting = 0

    def submit(self) -> None:
        """Hand what was added to the kernel."""
        if self.is_async:
            self.uring.submit()

    def reap(self) -> None:
        """Take what has come back, and push every request that is over and first."""
        if self.is_async:
            uring = self.uring
            while uring.reap():
                self._came_back(uring.user_data, uring.result)
        self._retire()

    def _came_back(self, user_data: int, result: int) -> None:
        slot = user_data & SLOT_MASK
        request = self.requests[slot]
        if request.kind == READ or request.kind == WRITE:
            self._went_on(request, result)
            if request.waiting:
                self._start(slot, request)
                self.submit()
            return
        request.waiting -= 1
        if result < 0:
            self._failed(request, user_data >> SLOT_BITS, result)

    def _failed(self, request: DiskRequest, segment: int, result: int) -> None:
        if request.is_syncing:
            # Linux marks the lost pages clean: nothing may claim durability from now on.
            self.store.is_failed = True
            request.error = -result
        else:
            # Not every file system can do every mode; the store knows another way.
            self._format_now(request, *request.segments[segment])

    def _retire(self) -> None:
        while self.in_flight:
            slot = self._first & SLOT_MASK
            request = self.requests[slot]
            if request.kind == SYNC and request.started == 0:
                request.started = now_ns()
                self._sync(slot, request)
            elif (
                request.kind == FORMAT
                and request.is_durable
                and not (request.waiting or request.is_syncing or request.error)
            ):
                self._sync(slot, request)
            if request.waiting:
                return
            self.requests[slot] = _NO_REQUEST
            self._first += 1
            self.in_flight -= 1
            self.limiter.busy -= 1
            self.growth -= request.growth
            self._end(request)

    def _end(self, request: DiskRequest) -> None:
        is_promise = request.kind == SYNC or (request.is_durable and request.kind != READ)
        if is_promise and self.store.is_failed and not request.error:
            request.error = errno.EIO
        if request.kind != OVER:
            request.region.ram[request.status_at] = STATUS_IOERR if request.error else STATUS_OK
            operation = OPS[request.kind]
            if request.error:
                self.stats.deny(operation, self.store.denial(request.error), request.length)
            else:
                index = operation.index
                self.stats.count(index, request.length)
                if request.started:
                    now = now_ns()
                    taken = now - request.started
                    self.stats.sample(index, taken, request.length, now)
                    taken = taken - request.gated - request.passed
                    self.stats.profile(index, request.gated, request.passed, 0, taken)
        self.vring.push(request.head, request.written)
        self.release(request)

    def drain(self) -> None:
        """Return when every request is over and pushed. Waits for the disk."""
        self.reap()
        while self.in_flight:
            self.uring.wait()
            self.reap()
        self._pool.clear()

"""The split virtqueue, device side (VIRTIO 1.3, 2.7), with indirect descriptors and event index.

Three areas lie in guest memory and are the driver's to rewrite at any time; each field is read once:

* descriptor table: 16 bytes a descriptor, ``addr u64, len u32, flags u16, next u16``
* avail ring: ``flags u16, idx u16, ring[size] u16, used_event u16``
* used ring: ``flags u16, idx u16, ring[size] {id u32, len u32}, avail_event u16``

Invariants: chains are popped in avail order; the used index is stored after the entries it covers, with one
16-bit store (`memoryview.cast("H")`; `struct.pack_into` clears first and a driver saw the zeros); a queue that
broke the rules is latched and not parsed again until `stop`.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from threading import Lock
from typing import Final

from devices.errors import ChainError, QueueError
from devices.virtio.chain import Chain
from devices.virtio.memory import GuestMemory

DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
AVAIL_F_NO_INTERRUPT: Final = 1

_DESCRIPTOR: Final = struct.Struct("<QIHH")
DESCRIPTOR_BYTES: Final = _DESCRIPTOR.size
AVAIL_HEADER_BYTES: Final = 4
USED_HEADER_BYTES: Final = 4
USED_ELEMENT_BYTES: Final = 8

#: VIRTIO 1.3, 2.7: at most 32768; QEMU never makes a queue longer than 1024 (VIRTQUEUE_MAX_SIZE).
MAX_QUEUE_SIZE: Final = 1024
#: Bytes one chain may describe: beyond 4 GiB a u32 used length cannot say what was written.
MAX_CHAIN_BYTES: Final = 0xFFFFFFFF

_fence = Lock()


def descriptor_table_bytes(size: int) -> int:
    return DESCRIPTOR_BYTES * size


def avail_ring_bytes(size: int) -> int:
    return AVAIL_HEADER_BYTES + 2 * size + 2


def used_ring_bytes(size: int) -> int:
    return USED_HEADER_BYTES + USED_ELEMENT_BYTES * size + 2


class Vring:
    """One queue. `attach` makes it live; `pop`, `push`, `publish` and `arm` are the data path.

    Counters: `chain_errors` chains returned unused, `requests` chains popped, `calls` notifications sent.
    `broken` holds the sentence of the fault that latched the queue, else the empty string.
    """

    __slots__ = (
        "_avail",
        "_avail_shadow",
        "_busy",
        "_descriptors",
        "_event_idx",
        "_indirect",
        "_last_avail",
        "_mask",
        "_memory",
        "_signalled",
        "_used",
        "_used_elements",
        "_used_idx",
        "_used_published",
        "attached",
        "broken",
        "call_fd",
        "calls",
        "chain_errors",
        "error_fd",
        "index",
        "kicks",
        "requests",
        "size",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 0
        self.attached = False
        self.broken = ""
        self.call_fd = -1
        self.error_fd = -1
        self.requests = 0
        self.chain_errors = 0
        self.calls = 0
        self.kicks = 0
        self._last_avail = 0
        self._used_idx = 0
        self._detach()

    def _detach(self) -> None:
        empty = memoryview(bytearray(0))
        self._memory = GuestMemory()
        self._descriptors = empty
        self._avail = empty
        self._used = empty
        self._used_elements = empty
        self._busy = bytearray(0)
        self._mask = 0
        self._event_idx = False
        self._indirect = False
        self._signalled = False
        self._avail_shadow = self._last_avail
        self._used_published = self._used_idx
        self.attached = False

    def attach(
        self,
        memory: GuestMemory,
        size: int,
        descriptors: memoryview,
        avail: memoryview,
        used: memoryview,
        *,
        base: int | None,
        event_idx: bool,
        indirect: bool,
    ) -> None:
        """Start on three views of exactly the lengths the functions above give for `size`.

        `base` is the avail index to go on from; None takes the used index out of guest memory, which is right
        for a queue that is completed in order, after its former backend died.
        """
        self._memory = memory
        self.size = size
        self._mask = size - 1
        self._descriptors = descriptors
        self._avail = avail.cast("H")
        self._used = used.cast("H")
        self._used_elements = used[USED_HEADER_BYTES : USED_HEADER_BYTES + USED_ELEMENT_BYTES * size].cast(
            "I"
        )
        self._used_idx = self._used_published = self._used[1]
        self._last_avail = self._avail_shadow = self._used_idx if base is None else base
        self._busy = bytearray(size)
        self._event_idx = event_idx
        self._indirect = indirect
        self._signalled = False
        self.broken = ""
        self.attached = True

    def stop(self) -> int:
        """Let go of guest memory; returns the avail index a successor starts from."""
        self._detach()
        self.broken = ""
        return self._last_avail

    @property
    def used_index(self) -> int:
        """The used index as last stored: what commits a saved device state."""
        return self._used_published

    @property
    def next_used_index(self) -> int:
        """The used index that the next `publish` will store."""
        return self._used_idx

    def latch(self, reason: str) -> QueueError:
        """Mark the queue broken (class Q) and tell the frontend; returns the error to raise."""
        self.broken = f"queue {self.index}: {reason}"
        _signal(self.error_fd)
        return QueueError(self.broken)

    def pop(self) -> Chain | None:
        """The next available chain, or None. Chain faults are answered here and skipped.

        Errors: QueueError once when the driver broke the ring; afterwards None until `stop`.
        """
        while True:
            last = self._last_avail
            if last == self._avail_shadow:
                if self.broken or not self.attached:
                    return None
                shadow = self._avail[1]
                waiting = (shadow - last) & 0xFFFF
                if waiting == 0:
                    return None
                if waiting > self.size:
                    raise self.latch(f"avail index jumped by {waiting}, the queue holds {self.size}")
                self._avail_shadow = shadow
            elif self.broken:
                return None
            head = self._avail[2 + (last & self._mask)]
            if head >= self.size:
                raise self.latch(f"head {head} is outside a table of {self.size} descriptors")
            if self._busy[head]:
                raise self.latch(f"head {head} was offered again while in flight")
            self._last_avail = (last + 1) & 0xFFFF
            self.requests += 1
            try:
                chain = self._walk(head)
            except ChainError:
                self.chain_errors += 1
                self._busy[head] = 1
                self.push(head, 0)
                continue
            self._busy[head] = 1
            return chain

    def unpop(self, chain: Chain) -> None:
        """Give the chain that was popped last back to the queue, untouched."""
        self._busy[chain.head] = 0
        self._last_avail = (self._last_avail - 1) & 0xFFFF
        self.requests -= 1

    def _walk(self, head: int) -> Chain:
        unpack = _DESCRIPTOR.unpack_from
        table = self._descriptors
        limit = self.size
        address, length, flags, following = unpack(table, head * DESCRIPTOR_BYTES)
        if flags & DESC_F_INDIRECT:
            if not self._indirect:
                raise self.latch("an indirect descriptor without the feature")
            if flags & DESC_F_NEXT:
                raise self.latch("a descriptor with both INDIRECT and NEXT")
            count, rest = divmod(length, DESCRIPTOR_BYTES)
            if rest or not 1 <= count <= MAX_QUEUE_SIZE:
                raise self.latch(
                    f"an indirect table of {length} bytes: a multiple of 16 from 16 to {MAX_QUEUE_SIZE * 16} is allowed"
                )
            try:
                # A private copy: the table is short, and a copy cannot change under the walk.
                table = memoryview(bytes(self._memory.view(address, length)))
            except ChainError as error:
                raise self.latch(f"the indirect table is not in guest memory: {error}") from None
            limit = count
            address, length, flags, following = unpack(table, 0)
        view_of = self._memory.view
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        readable_bytes = writable_bytes = 0
        seen = 1
        fault: ChainError | None = None
        while True:
            if flags & DESC_F_INDIRECT:
                raise self.latch("a nested indirect descriptor")
            try:
                view = view_of(address, length)
                if flags & DESC_F_WRITE:
                    if length:
                        writable.append(view)
                    writable_bytes += length
                elif writable_bytes:
                    raise ChainError("a device-readable buffer behind a device-writable one")
                else:
                    if length:
                        readable.append(view)
                    readable_bytes += length
            except ChainError as error:
                fault = fault or error
            if not flags & DESC_F_NEXT:
                break
            seen += 1
            if seen > limit:
                raise self.latch(f"a descriptor chain longer than {limit}: it loops")
            if following >= limit:
                raise self.latch(f"next descriptor {following} is outside a table of {limit}")
            address, length, flags, following = unpack(table, following * DESCRIPTOR_BYTES)
        if fault is not None:
            raise fault
        if readable_bytes + writable_bytes > MAX_CHAIN_BYTES:
            raise ChainError(
                f"a chain of {readable_bytes + writable_bytes} bytes: at most {MAX_CHAIN_BYTES} are allowed"
            )
        return Chain(head, readable, readable_bytes, writable, writable_bytes)

    def push(self, head: int, written: int) -> None:
        """Complete a chain with `written` bytes in its writable buffers; the driver sees it at `publish`."""
        position = (self._used_idx & self._mask) * 2
        self._used_elements[position] = head
        self._used_elements[position + 1] = written
        self._used_idx = (self._used_idx + 1) & 0xFFFF
        self._busy[head] = 0

    def publish(self) -> None:
        """Store the used index and call the driver if it asked for that."""
        new = self._used_idx
        old = self._used_published
        if new == old:
            return
        self._used[1] = new
        self._used_published = new
        with _fence:
            pass
        if not self._signalled:
            notify = True
            self._signalled = True
        elif self._event_idx:
            used_event = self._avail[2 + self.size]
            notify = (new - used_event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            notify = not self._avail[0] & AVAIL_F_NO_INTERRUPT
        if notify:
            self.calls += 1
            _signal(self.call_fd)

    def call(self) -> None:
        """Notify the driver unasked: once after a take-over, since a predecessor's call may be lost."""
        self.calls += 1
        _signal(self.call_fd)

    def arm(self) -> bool:
        """Ask for a kick at the next available chain; True when one is already there (look again)."""
        if not self.attached or self.broken:
            return False
        if self._event_idx:
            self._used[2 + 4 * self.size] = self._last_avail
            with _fence:
                pass
        return bool(self._avail[1] != self._last_avail)


def _signal(fd: int) -> None:
    if fd >= 0:
        # A full counter means that the other side has a wake-up coming anyway.
        with suppress(BlockingIOError):
            os.eventfd_write(fd, 1)

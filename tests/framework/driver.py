"""The driver's side of a split virtqueue (VIRTIO 1.3, 2.7), honest or not.

`DriverQueue` owns the three areas in guest memory and the eventfds. Three levels, each on the one below:

* raw: `set_descriptor`, `offer`, `set_avail_index`: anything a hostile driver can write;
* chains: `add` builds a direct or indirect chain out of free descriptors, `collect` takes used entries and frees them;
* batches: `offer` takes a list of heads that were built once, `reap` counts and re-arms: no object per request.
"""

from __future__ import annotations

import os
import select
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from tests.framework.guest_memory import GuestRam

# VIRTIO 1.3, 2.7.5 to 2.7.8, written down a second time: a judge does not ask the judged.
DESCRIPTOR: Final = struct.Struct("<QIHH")
DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4


def descriptor_table_bytes(size: int) -> int:
    return 16 * size


def avail_ring_bytes(size: int) -> int:
    return 6 + 2 * size


def used_ring_bytes(size: int) -> int:
    return 6 + 8 * size


#: A buffer: guest address, length.
Buffer = tuple[int, int]


class DriverQueue:
    """One queue of `size` descriptors in `ram`. `close` gives the eventfds back."""

    is_packed = False
    #: Where a device begins in a ring that was reset.
    start = 0

    def __init__(self, ram: GuestRam, size: int = 256, *, event_idx: bool = True) -> None:
        self.ram = ram
        self.size = size
        self.event_idx = event_idx
        self.descriptors = ram.allocate(descriptor_table_bytes(size), 4096)
        self.avail_bytes, self.used_bytes = self.area_bytes(size)
        self.avail = ram.allocate(self.avail_bytes, 4)
        self.used = ram.allocate(self.used_bytes, 4)
        self._table = ram.slice(self.descriptors, descriptor_table_bytes(size))
        self._avail = ram.slice(self.avail, self.avail_bytes).cast("H")
        self._used = ram.slice(self.used, self.used_bytes).cast("H")
        self._elements = ram.slice(self.used, self.used_bytes & ~3)[4:].cast("I")
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.error_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self.call_fd, select.POLLIN)
        self.reset()

    @staticmethod
    def area_bytes(size: int) -> tuple[int, int]:
        """Of the driver's and of the device's area."""
        return avail_ring_bytes(size), used_ring_bytes(size)

    def reset(self) -> None:
        """As the driver does it before the queue is set up anew: rings cleared, every descriptor free."""
        self._table[:] = bytes(len(self._table))
        self.ram.write(self.avail, bytes(self.avail_bytes))
        self.ram.write(self.used, bytes(self.used_bytes))
        self.free = list(range(self.size - 1, -1, -1))
        self._chains: dict[int, list[int]] = {}
        self._avail_index = 0
        self._kicked_index = 0
        self._used_index = 0
        for fd in (self.kick_fd, self.call_fd, self.error_fd):
            with suppress(BlockingIOError):
                os.eventfd_read(fd)

    def close(self) -> None:
        """Let go of eventfds and guest memory; the queue is not used again."""
        for view in (self._elements, self._used, self._avail, self._table):
            view.release()
        for fd in (self.kick_fd, self.call_fd, self.error_fd):
            os.close(fd)

    # -- raw -----------------------------------------------------------------------------------------------------

    def set_descriptor(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        DESCRIPTOR.pack_into(self._table, index * DESCRIPTOR.size, address, length, flags, following)

    def set_avail_index(self, index: int) -> None:
        """Store the avail index, whatever it was."""
        self._avail_index = index & 0xFFFF
        self._avail[1] = self._avail_index

    @property
    def avail_index(self) -> int:
        return self._avail_index

    @property
    def used_index(self) -> int:
        """The used index as the device stored it."""
        return self._used[1]

    @property
    def device_base(self) -> int:
        """Where a device goes on that has nothing in hand."""
        return self.used_index

    def offer(self, heads: Sequence[int]) -> None:
        """Make heads available with one store of the index; does not kick."""
        entries = memoryview(array("H", heads))
        start, count = self._avail_index & (self.size - 1), len(entries)
        first = min(count, self.size - start)
        self._avail[2 + start : 2 + start + first] = entries[:first]
        if first < count:
            self._avail[2 : 2 + count - first] = entries[first:]
        self.set_avail_index(self._avail_index + count)

    @staticmethod
    def pack_table(buffers: Sequence[tuple[int, int, int]]) -> bytes:
        """An indirect table of (address, length, flags)."""
        return pack_table(buffers)

    # -- chains --------------------------------------------------------------------------------------------------

    def add(
        self, readable: Sequence[Buffer] = (), writable: Sequence[Buffer] = (), *, indirect: bool = False
    ) -> int:
        """Lay out a chain (not yet offered); returns its head. The indirect table goes into fresh guest memory."""
        buffers = [(address, length, 0) for address, length in readable]
        buffers += [(address, length, DESC_F_WRITE) for address, length in writable]
        if indirect:
            head = self.free.pop()
            table = self.ram.put(self.pack_table(buffers))
            self.set_descriptor(head, table, DESCRIPTOR.size * len(buffers), DESC_F_INDIRECT)
            self._chains[head] = [head]
            return head
        taken = [self.free.pop() for _ in buffers]
        for position, (address, length, flags) in enumerate(buffers):
            last = position + 1 == len(buffers)
            following = 0 if last else taken[position + 1]
            self.set_descriptor(
                taken[position], address, length, flags | (0 if last else DESC_F_NEXT), following
            )
        self._chains[taken[0]] = taken
        return taken[0]

    def submit(
        self, readable: Sequence[Buffer] = (), writable: Sequence[Buffer] = (), *, indirect: bool = False
    ) -> int:
        """`add`, `offer` and `kick`."""
        head = self.add(readable, writable, indirect=indirect)
        self.offer([head])
        self.kick()
        return head

    def collect(self) -> list[tuple[int, int]]:
        """Every new used entry as (head, written); its descriptors are free again. Asks to be called for the next."""
        entries: list[tuple[int, int]] = []
        while True:
            used = self._used[1]
            while self._used_index != used:
                position = 2 * (self._used_index & (self.size - 1))
                head = self._elements[position]
                entries.append((head, self._elements[position + 1]))
                self.free.extend(reversed(self._chains.pop(head, [])))
                self._used_index = (self._used_index + 1) & 0xFFFF
            if not self.arm():
                return entries

    # -- notifications -------------------------------------------------------------------------------------------

    def needs_kick(self) -> bool:
        """Whether the device asked to hear of what was offered since the last kick (2.7.10)."""
        if self.event_idx:
            event = self._used[2 + 4 * self.size]
            since = (self._avail_index - self._kicked_index) & 0xFFFF
            return (self._avail_index - event - 1) & 0xFFFF < since
        return not self._used[0] & 1

    def kick(self, *, always: bool = False) -> None:
        """Notify the device if it wants that; `always` whatever it wants."""
        if always or self.needs_kick():
            with suppress(BlockingIOError):  # full: the device has a wake-up coming
                os.eventfd_write(self.kick_fd, 1)
        self._kicked_index = self._avail_index

    def arm(self, ahead: int = 0) -> bool:
        """Ask to be called at the next used entry but `ahead`; True when enough are there already (look again)."""
        if self.event_idx:
            self._avail[2 + self.size] = (self._used_index + ahead) & 0xFFFF
        else:
            self._avail[0] = 0
        return (self._used[1] - self._used_index) & 0xFFFF > ahead

    def disarm(self) -> None:
        """Ask not to be called."""
        if self.event_idx:
            self._avail[2 + self.size] = (self._used_index - 1) & 0xFFFF
        else:
            self._avail[0] = 1

    def wait(self, timeout: float = 5.0) -> bool:
        """Sleep until the device calls; False after `timeout` seconds."""
        if not self._poll.poll(timeout * 1000):
            return False
        with suppress(BlockingIOError):
            os.eventfd_read(self.call_fd)
        return True

    def was_called(self) -> bool:
        """Whether the device called since the last look."""
        return self.wait(0)

    def has_error(self) -> bool:
        """Whether the device raised the error eventfd since the last look."""
        try:
            return os.eventfd_read(self.error_fd) > 0
        except BlockingIOError:
            return False

    # -- batches -------------------------------------------------------------------------------------------------

    def reap(self) -> array[int]:
        """The heads of the new used entries, in order; descriptors stay built, for offering them again as they are."""
        used, mask = self._used[1], self.size - 1
        start, count = self._used_index & mask, (used - self._used_index) & 0xFFFF
        first = min(count, self.size - start)
        heads = array("I", self._elements[2 * start : 2 * (start + first)].tobytes())
        if first < count:
            heads.frombytes(self._elements[: 2 * (count - first)].tobytes())
        self._used_index = used
        return heads[::2]


def pack_table(buffers: Sequence[tuple[int, int, int]]) -> bytes:
    """An indirect table of (address, length, flags), chained in order."""
    last = len(buffers) - 1
    return b"".join(
        DESCRIPTOR.pack(address, length, flags | (0 if i == last else DESC_F_NEXT), 0 if i == last else i + 1)
        for i, (address, length, flags) in enumerate(buffers)
    )

"""The driver's side of a split ring inside a device's own process (VIRTIO 1.3, 2.7), for guests without our driver.

A controller or card that QEMU emulates has no ring of ours. Whoever speaks for it here (`blk/nbd.py`, `net/stream.py`)
fills chains as a driver would, so the device behind the ring is the same to the last counter: its gate, quota, limits,
faults and accounts.

Invariant: each slot is one chain of descriptors that is laid out once; a slot is offered again only after the device
has given it back. The memory is the process's own and holds nothing that outlives it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.virtio.layout import (
    DESC_F_NEXT,
    DESC_F_WRITE,
    avail_ring_bytes,
    descriptor_table_bytes,
    used_ring_bytes,
)
from rayos_devices.virtio.memory import GuestMemory, RegionSpec

#: linux/fcntl.h, not in the fcntl module before Python 3.12's rename.
_F_ADD_SEALS: Final = 1033
_SEALS: Final = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
#: Guest-physical and user addresses are the same here; none of them is 0.
_BASE: Final = 1 << 20
_PAGE: Final = 4096

#: A buffer of a chain: address, length in bytes, whether the device writes it.
Buffer = tuple[int, int, bool]


class LocalMemory:
    """Memory of this process that the rings of a device can reach; what is allocated stays so."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = -(-size_bytes // _PAGE) * _PAGE
        fd = os.memfd_create("rayos-local-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self.size_bytes)
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
            self.memory = GuestMemory()
            self.memory.replace([RegionSpec(_BASE, self.size_bytes, _BASE, 0)], [fd])
        finally:
            os.close(fd)
        self._next = _BASE

    def allocate(self, size_bytes: int, alignment: int = 64) -> int:
        """The address of so many bytes.

        Errors: ValueError when there is no more.
        """
        address = -(-self._next // alignment) * alignment
        if address + size_bytes > _BASE + self.size_bytes:
            raise ValueError(f"{size_bytes} bytes at {address - _BASE} of {self.size_bytes}")
        self._next = address + size_bytes
        return address

    def view(self, address: int, size_bytes: int) -> memoryview:
        """The bytes at an address."""
        return self.memory.view(address, size_bytes)


def ring_bytes(size: int) -> int:
    """How much memory a ring of `size` descriptors takes, at most."""
    return descriptor_table_bytes(size) + avail_ring_bytes(size) + used_ring_bytes(size) + 3 * _PAGE


class LocalQueue:
    """One queue of `backend`, live from here on. `on_used` is called when the device has given something back.

    `size` is a power of two; `acked` are the features that the driver acknowledged, which `Backend.set_features` was
    told.
    """

    def __init__(
        self, backend: Backend, index: int, memory: LocalMemory, size: int, on_used: Callable[[], None]
    ) -> None:
        self._backend = backend
        self._index = index
        self._on_used = on_used
        self._mask = size - 1
        areas = (descriptor_table_bytes(size), avail_ring_bytes(size), used_ring_bytes(size))
        table, avail, used = (memory.view(memory.allocate(area, 16), area) for area in areas)
        self._table64, self._table32, self._table16 = table.cast("Q"), table.cast("I"), table.cast("H")
        self._avail, self._used = avail.cast("H"), used.cast("H")
        self._elements = used[4 : 4 + 8 * size].cast("I")
        self._avail_index = self._used_index = 0
        self._is_scheduled = False
        self._is_closed = False
        vring = backend.queues[index]
        self._call = vring.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        backend.loop.register(self._call, self._called)
        vring.attach(memory.memory, size, table, avail, used, base=0, event_idx=False, indirect=False)
        backend.start_queue(index, resumed=False)

    def lay_out(self, head: int, buffers: Sequence[Buffer]) -> None:
        """Writes a chain into the descriptors from `head` on, one a buffer."""
        for at, (address, length, is_written) in enumerate(buffers, head):
            is_last = at + 1 == head + len(buffers)
            self._table64[2 * at] = address
            self._table32[4 * at + 2] = length
            self._table16[8 * at + 6] = (DESC_F_WRITE if is_written else 0) | (0 if is_last else DESC_F_NEXT)
            self._table16[8 * at + 7] = 0 if is_last else at + 1

    def offer(self, head: int) -> None:
        """Makes the chain available; the device sees it at `kick`."""
        self._avail[2 + (self._avail_index & self._mask)] = head
        self._avail_index = (self._avail_index + 1) & 0xFFFF
        self._avail[1] = self._avail_index

    def kick(self) -> None:
        """Has the device look at the queue, in a moment: never from within one of its own callbacks."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._backend.loop.call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        if self._is_closed:
            return
        if self._backend.run_queue(self._index):
            self.kick()

    def take_used(self) -> list[tuple[int, int]]:
        """Every chain that the device has given back since the last call: its head, and the bytes written into it."""
        found = []
        end = self._used[1]
        while self._used_index != end:
            at = 2 * (self._used_index & self._mask)
            found.append((self._elements[at], self._elements[at + 1]))
            self._used_index = (self._used_index + 1) & 0xFFFF
        return found

    def _called(self, _events: int) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._call)
        self._on_used()

    def close(self) -> None:
        """Stops the queue: the device is done with it when this returns."""
        self._is_closed = True
        self._backend.stop_queue(self._index)
        self._backend.queues[self._index].stop()
        self._backend.queues[self._index].call_fd = -1
        self._backend.loop.unregister(self._call)
        os.close(self._call)

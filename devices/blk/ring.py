"""The block device's hot loop: reads and writes that hit the page cache, a batch at a time, with every check in place.

A request whose header is one buffer goes: take -> header (each field read once) -> range, gate, quota -> one preadv2 or
pwritev2 on the guest's own pages -> status byte -> push. Whatever is not of that shape, or does not succeed at once (a
cache miss, a refusal, another request type), is left to the general path: `drain` stops with it in hand.
"""

from __future__ import annotations

from typing import Final

from devices.gate import Gate, Op
from devices.native import Buffers, now_ns
from devices.stats import Stats
from devices.virtio.layout import NOTHING
from devices.virtio.vring import Vring

#: linux/fs.h: fail with EAGAIN rather than wait for the disk.
RWF_NOWAIT: Final = 0x8

SECTOR_SHIFT: Final = 9
SECTOR_MASK: Final = 511
HEADER_BYTES: Final = 16
TYPE_IN: Final = 0
TYPE_OUT: Final = 1
STATUS_OK: Final = 0

#: `drain` used up its budget.
SPENT: Final = -2

#: Requests after which the driver is told, if it wants: a deep queue's driver should not wait for all of it.
PUBLISH_EVERY: Final = 4

READ_OP: Final = Op.DISK_READ.index
WRITE_OP: Final = Op.DISK_WRITE.index


class BlkRing:
    """One queue's loop. `headroom` bytes may still be written before a quota on storage must be measured."""

    def __init__(
        self, vring: Vring, fd: int, size_bytes: int, stats: Stats, gate: Gate, max_bytes: int
    ) -> None:
        self.vring = vring
        self.fd = fd
        self.size_bytes = size_bytes
        self.max_bytes = max_bytes
        self.read_flags = RWF_NOWAIT
        self.read_only = False
        self.headroom = 0
        self.stats = stats
        self.gate = gate
        self.buffers = Buffers()
        self.served = 0

    def drain(self, budget: int) -> int:
        """Serve up to `budget` requests; NOTHING, SPENT, or the head of a taken chain for the general path.

        Everything served is pushed; the caller publishes the rest. Errors: QueueError from the vring.
        """
        vring = self.vring
        self.served = 0
        while self.served < budget:
            head = vring.take()
            if head < 0:
                return NOTHING
            self.served += 1
            if not self._serve():
                return head
            vring.push(head, vring.writable_bytes)
            if self.served % PUBLISH_EVERY == 0:
                vring.publish()
        return SPENT

    def _serve(self) -> bool:
        vring = self.vring
        count = vring.count
        split = vring.readable_count
        if split == 0 or count == split or vring.lengths[0] < HEADER_BYTES or vring.starts[0] & 7:
            return False
        region = vring.regions[0]
        at = vring.starts[0]
        if at + HEADER_BYTES > region.size & ~15:
            return False
        kind = region.ram32[at >> 2]
        sector = region.ram64[(at + 8) >> 3]
        started = now_ns()
        self.buffers.clear()
        if kind == TYPE_IN:
            if split != 1 or not self._collect(1, count, vring.writable_bytes - 1):
                return False
            operation = READ_OP
        elif kind == TYPE_OUT:
            skip = 0 if vring.lengths[0] > HEADER_BYTES else 1
            if self.read_only or not self._collect(skip, split, vring.readable_bytes - HEADER_BYTES):
                return False
            operation = WRITE_OP
        else:
            return False
        length = self.buffers.total
        if length & SECTOR_MASK or length > self.max_bytes or sector > self.size_bytes >> SECTOR_SHIFT:
            return False
        offset = sector << SECTOR_SHIFT
        if offset + length > self.size_bytes or not self.gate.allows(operation):
            return False
        if operation == READ_OP:
            done = self.buffers.read(self.fd, offset, self.read_flags)
        else:
            if length > self.headroom:
                return False
            done = self.buffers.write(self.fd, offset, 0)
        if done != length:
            return False
        if operation == WRITE_OP:
            self.headroom -= length
        last = count - 1
        region = vring.regions[last]
        region.ram[vring.starts[last] + vring.lengths[last] - 1] = STATUS_OK
        self.stats.count(operation, length)
        self.stats.sample(operation, now_ns() - started)
        return True

    def _collect(self, first: int, end: int, limit: int) -> bool:
        """The buffers `first` to `end` of the chain, without the header and at most `limit` bytes; False: too many."""
        vring = self.vring
        for index in range(first, end):
            start = vring.starts[index]
            length = vring.lengths[index]
            if index == 0:
                start += HEADER_BYTES
                length -= HEADER_BYTES
            if self.buffers.total + length > limit:
                length = limit - self.buffers.total
            if length:
                region = vring.regions[index]
                if not self.buffers.add(region.ram, start, length):
                    return False
        return True

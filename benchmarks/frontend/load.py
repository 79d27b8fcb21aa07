"""The driver side of one virtqueue under load: compiled by `make bench`, so that its speed does not hide the backend's.

Slots of a fixed shape (header, data, status for blk; header with frame for net) are laid out once; offering one
is a few stores. It runs compiled only.
"""

import os
import select
import time
from contextlib import suppress

import cython


@cython.cclass
class BlkLoad:
    """`depth` requests of `block` bytes in flight against a disk of `sectors`, on a ring of `size` descriptors."""

    ram8: cython.uchar[::1]
    ram16: cython.ushort[::1]
    ram32: cython.uint[::1]
    ram64: cython.ulonglong[::1]
    kick_fd: cython.int
    call_fd: cython.int
    size: cython.uint
    desc: cython.ulonglong
    avail: cython.ulonglong
    used: cython.ulonglong
    headers: cython.ulonglong
    data: cython.ulonglong
    statuses: cython.ulonglong
    indirect: cython.ulonglong
    avail_idx: cython.uint
    used_idx: cython.uint
    kicked_idx: cython.uint
    rng: cython.ulonglong
    errors = cython.declare(cython.ulonglong, visibility="readonly")
    kicks = cython.declare(cython.ulonglong, visibility="readonly")
    sleeps = cython.declare(cython.ulonglong, visibility="readonly")
    poller: object

    def __init__(self, ram, kick_fd, call_fd, size, layout):
        self.ram8 = ram
        self.ram16 = ram.cast("H")
        self.ram32 = ram.cast("I")
        self.ram64 = ram.cast("Q")
        self.kick_fd = kick_fd
        self.call_fd = call_fd
        self.size = size
        self.desc, self.avail, self.used, self.headers, self.data, self.statuses, self.indirect = layout
        self.rng = 88172645463325252
        self.poller = select.poll()
        self.poller.register(call_fd, select.POLLIN)

    def prepare(self, depth: cython.uint, block: cython.uint, write: cython.bint, use_indirect: cython.bint):
        """Lay out `depth` slots."""
        slot: cython.uint
        for slot in range(depth):
            header: cython.ulonglong = self.headers + slot * 16
            self.ram32[header >> 2] = 1 if write else 0
            table: cython.ulonglong = self.indirect + slot * 64 if use_indirect else self.desc + slot * 48
            base: cython.uint = 0 if use_indirect else slot * 3
            self._descriptor(table, header, 16, 1, base + 1)
            self._descriptor(table + 16, self.data + slot * block, block, 1 if write else 3, base + 2)
            self._descriptor(table + 32, self.statuses + slot, 1, 2, 0)
            if use_indirect:
                self._descriptor(self.desc + slot * 16, table, 48, 4, 0)

    @cython.cfunc
    def _descriptor(
        self,
        at: cython.ulonglong,
        address: cython.ulonglong,
        length: cython.uint,
        flags: cython.uint,
        following: cython.uint,
    ) -> cython.void:
        self.ram64[at >> 3] = address
        self.ram32[(at + 8) >> 2] = length
        self.ram16[(at + 12) >> 1] = flags
        self.ram16[(at + 14) >> 1] = following

    def run(
        self,
        depth: cython.uint,
        block: cython.uint,
        sectors: cython.ulonglong,
        seconds: cython.double,
        use_indirect: cython.bint,
        spin: cython.uint,
    ):
        """Returns (completed requests, elapsed seconds)."""
        blocks: cython.ulonglong = sectors * 512 // block
        per: cython.ulonglong = block // 512
        done: cython.ulonglong = 0
        mask: cython.uint = self.size - 1
        slot: cython.uint
        used: cython.uint
        idle: cython.uint = 0
        stop: cython.bint = False
        in_flight: cython.uint = 0
        start: cython.double = time.perf_counter()
        end: cython.double = start + seconds
        for slot in range(depth):
            self._offer(slot, blocks, per, use_indirect, mask)
            in_flight += 1
        self._publish(use_indirect)
        while in_flight:
            used = self.ram16[(self.used + 2) >> 1]
            if used == self.used_idx:
                idle += 1
                if idle > spin:
                    self.ram16[(self.avail + 4 + 2 * self.size) >> 1] = self.used_idx
                    fence()
                    if self.ram16[(self.used + 2) >> 1] == self.used_idx:
                        self.sleeps += 1
                        self.poller.poll(5000)
                        with suppress(BlockingIOError):
                            os.read(self.call_fd, 8)
                        if (
                            self.ram16[(self.used + 2) >> 1] == self.used_idx
                            and time.perf_counter() > end + 4
                        ):
                            raise RuntimeError("the backend stalled")
                    idle = 0
                continue
            idle = 0
            while self.used_idx != used:
                head: cython.uint = self.ram32[(self.used + 4 + 8 * (self.used_idx & mask)) >> 2]
                slot = head if use_indirect else head // 3
                self.used_idx = (self.used_idx + 1) & 0xFFFF
                done += 1
                in_flight -= 1
                if self.ram8[self.statuses + slot] != 0:
                    self.errors += 1
                if not stop:
                    self._offer(slot, blocks, per, use_indirect, mask)
                    in_flight += 1
            if not stop:
                self._publish(use_indirect)
                if time.perf_counter() > end:
                    stop = True
        return done, time.perf_counter() - start

    @cython.cfunc
    def _offer(
        self,
        slot: cython.uint,
        blocks: cython.ulonglong,
        per: cython.ulonglong,
        use_indirect: cython.bint,
        mask: cython.uint,
    ) -> cython.void:
        self.rng ^= self.rng << 13
        self.rng ^= self.rng >> 7
        self.rng ^= self.rng << 17
        self.ram64[(self.headers + slot * 16 + 8) >> 3] = (self.rng >> 11) % blocks * per
        self.ram8[self.statuses + slot] = 0xFF
        self.ram16[(self.avail + 4 + 2 * (self.avail_idx & mask)) >> 1] = slot if use_indirect else slot * 3
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    @cython.cfunc
    def _publish(self, use_indirect: cython.bint) -> cython.void:
        old: cython.uint = self.kicked_idx
        new: cython.uint = self.avail_idx
        if old == new:
            return
        self.ram16[(self.avail + 2) >> 1] = new
        fence()
        event: cython.uint = self.ram16[(self.used + 4 + 8 * self.size) >> 1]
        self.kicked_idx = new
        if ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF):
            self.kicks += 1
            os.eventfd_write(self.kick_fd, 1)

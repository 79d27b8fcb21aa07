"""The driver side of a network device under load: a transmit ring kept full, and receive buffers for what comes back.

It never sleeps: the server's speed is what is looked for. It runs compiled only.
"""

import os
import time

import cython


@cython.cclass
class Queue:
    """One ring of `size` descriptors, each a whole slot (header and frame), offered over and over."""

    ram16: cython.ushort[::1]
    ram32: cython.uint[::1]
    ram64: cython.ulonglong[::1]
    kick_fd: cython.int
    size: cython.uint
    avail: cython.ulonglong
    used: cython.ulonglong
    avail_idx: cython.uint
    used_idx: cython.uint
    kicked_idx: cython.uint
    event_idx: cython.bint
    kicks = cython.declare(cython.ulonglong, visibility="readonly")

    def __init__(self, ram, kick_fd, size, desc, avail, used, event_idx):
        self.ram16 = ram.cast("H")
        self.ram32 = ram.cast("I")
        self.ram64 = ram.cast("Q")
        self.kick_fd = kick_fd
        self.size = size
        self.avail = avail
        self.used = used
        self.event_idx = event_idx
        # The driver polls: no interrupts, which a device without event index reads here.
        self.ram16[avail >> 1] = 1
        self.desc = desc

    desc: cython.ulonglong

    @cython.cfunc
    def place(
        self, slot: cython.uint, address: cython.ulonglong, length: cython.uint, flags: cython.uint
    ) -> cython.void:
        at: cython.ulonglong = self.desc + 16 * slot
        self.ram64[at >> 3] = address
        self.ram32[(at + 8) >> 2] = length
        self.ram16[(at + 12) >> 1] = flags
        self.ram16[(at + 14) >> 1] = 0

    @cython.cfunc
    def offer(self, slot: cython.uint) -> cython.void:
        self.ram16[(self.avail + 4 + 2 * (self.avail_idx & (self.size - 1))) >> 1] = slot
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    @cython.cfunc
    def publish(self) -> cython.void:
        new: cython.uint = self.avail_idx
        old: cython.uint = self.kicked_idx
        if new == old:
            return
        fence()
        self.ram16[(self.avail + 2) >> 1] = new
        fence()
        self.kicked_idx = new
        wanted: cython.bint
        if self.event_idx:
            event: cython.uint = self.ram16[(self.used + 4 + 8 * self.size) >> 1]
            wanted = ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
        else:
            wanted = not self.ram16[self.used >> 1] & 1
        if wanted:
            self.kicks += 1
            os.eventfd_write(self.kick_fd, 1)

    @cython.cfunc
    def ready(self) -> cython.uint:
        return (self.ram16[(self.used + 2) >> 1] - self.used_idx) & 0xFFFF

    @cython.cfunc
    def collect(self) -> cython.uint:
        slot: cython.uint = self.ram32[(self.used + 4 + 8 * (self.used_idx & (self.size - 1))) >> 2]
        self.used_idx = (self.used_idx + 1) & 0xFFFF
        return slot


@cython.cclass
class NetLoad:
    """Frames of `length` bytes out of `data`, a slot of 2 KiB each, answers into as many slots behind them."""

    rx: Queue
    tx: Queue
    length: cython.uint
    stack: cython.uint[1024]
    top: cython.uint
    flying: cython.uint
    outside: cython.longlong

    def __init__(self, rx, tx, data, length):
        slot: cython.uint
        self.rx = rx
        self.tx = tx
        self.length = length
        half: cython.ulonglong = data + 2048 * self.tx.size
        base: cython.ulonglong = data
        for slot in range(self.tx.size):
            self.tx.place(slot, base + 2048 * slot, 12 + length, 0)
        for slot in range(self.tx.size):
            self.stack[slot] = slot
        self.top = self.tx.size
        self.flying = 0
        self.outside = 0
        for slot in range(self.rx.size):
            self.rx.place(slot, half + 2048 * slot, 2048, 2)
            self.rx.offer(slot)
        self.rx.publish()

    def run(self, seconds: cython.double, is_echo: cython.bint, window: cython.uint):
        """Returns (frames out, frames back, elapsed seconds); at most `window` are on their way."""
        sent: cython.ulonglong = 0
        back: cython.ulonglong = 0
        flying: cython.uint = self.flying
        outside: cython.longlong = self.outside
        top: cython.uint = self.top
        count: cython.uint
        turn: cython.uint = 0
        quiet: cython.uint = 0
        start: cython.double = time.perf_counter()
        end: cython.double = start + seconds
        while True:
            while top and flying < window and (not is_echo or outside < window):
                top -= 1
                self.tx.offer(self.stack[top])
                flying += 1
                outside += 1
            self.tx.publish()
            fence()  # the rings are looked at anew
            count = self.tx.ready()
            while count:
                self.stack[top] = self.tx.collect()
                top += 1
                flying -= 1
                sent += 1
                count -= 1
            count = self.rx.ready()
            quiet = 0 if count else quiet + 1
            while count:
                self.rx.offer(self.rx.collect())
                back += 1
                outside -= 1
                count -= 1
            if quiet > 1_000_000:
                outside = flying  # frames that were dropped never come
                quiet = 0
            self.rx.publish()
            turn += 1
            if turn & 255 == 0 and time.perf_counter() > end:
                self.top, self.flying, self.outside = top, flying, outside
                return sent, back, time.perf_counter() - start

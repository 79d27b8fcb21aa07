"""The block device's hot loop: requests off the ring, with every check in place.

A request goes: take -> header (each field read once) -> range, gate, quota -> one preadv2 or pwritev2 on the guest's
own pages -> status byte -> push. What would wait for the disk is not waited for: reads that miss the page cache, and
everything on an image opened O_DIRECT, go to io_uring (`rayos_devices.blk.flight`). Buffered writes are copies into
the page cache and done at once, until one takes longer than SLOW_NS, since the kernel throttles or reads first: then
io_uring takes them for SLOW_PAUSE_NS. What is neither a read nor a write, or is refused, is left to the general path:
`run` returns with it in hand.
"""

from __future__ import annotations

from errno import EAGAIN, EINTR, EOPNOTSUPP
from typing import Final

from rayos_devices.blk.flight import DiskRequest, Flight
from rayos_devices.blk.kinds import CROWDED, IDLE, LINGER_NS, OVER, READ, SPENT, WAIT, WRITE
from rayos_devices.bucket import Limiter
from rayos_devices.gate import Gate, Op
from rayos_devices.native import Buffers, now_ns
from rayos_devices.virtio.vring import Vring

#: linux/fs.h: fail with EAGAIN rather than wait for the disk.
RWF_NOWAIT: Final = 0x8

SECTOR_SHIFT: Final = 9
SECTOR_MASK: Final = 511
HEADER_BYTES: Final = 16
#: Header and status: the bytes of a chain that are no data.
FRAME_BYTES: Final = 17
TYPE_IN: Final = 0
TYPE_OUT: Final = 1
STATUS_OK: Final = 0
STATUS_IOERR: Final = 1

#: Requests after which the driver is told, if it wants: a deep queue's driver should not wait for all of it.
PUBLISH_EVERY: Final = 4
#: A buffered write that takes longer was held up by the disk; then writes go to io_uring for a while.
SLOW_NS: Final = 2_000_000
SLOW_PAUSE_NS: Final = 100_000_000
#: Nothing was done at once.
LATER: Final = -EAGAIN
#: After so many misses in a row only every eighth read is tried in the page cache first.
MISS_STREAK: Final = 16
RETRY_MASK: Final = 7
#: Polling may take this part (a shift: 1/8) of the time without finding anything, saved up to POLL_SAVED_NS.
POLL_SHARE_SHIFT: Final = 3
POLL_SAVED_NS: Final = 1_000_000

READ_OP: Final = Op.DISK_READ.index
WRITE_OP: Final = Op.DISK_WRITE.index


class BlkRing:
    """One queue's loop. `headroom` bytes may still be written before a quota on storage must be measured.

    `kind` and `sector` are those of the request that `run` returned. `is_watched`: it returns every one, since
    it may have to fail on purpose. `poll_ns` is how long an empty queue is looked at before a kick is asked for, 0 is
    never, and `linger_ns` the same after more than one request, none of them on its way. `publish_every` is after how
    many requests the driver is told.
    """

    def __init__(
        self, vring: Vring, flight: Flight, gate: Gate, limiter: Limiter, size_bytes: int, max_bytes: int
    ) -> None:
        self.vring = vring
        self.limiter = limiter
        self.flight = flight
        self.fd = flight.fd
        self.size_bytes = size_bytes
        self.max_bytes = max_bytes
        self.is_watched = False
        self.read_only = False
        self.is_direct = False
        #: Write through: a write is over when it is durable.
        self.is_durable = False
        self.headroom = 0
        self.poll_ns = 0
        self.linger_ns = LINGER_NS
        self.publish_every = PUBLISH_EVERY
        self.stats = flight.stats
        self.gate = gate
        self.served = 0
        self.kind = 0
        self.sector = 0
        self.offset = 0
        self.buffers = Buffers()
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._can_peek = True
        self._misses = 0
        self._slow_until = 0
        self._poll_credit = 0
        self._poll_stamp = 0
        # The last look at the clock; and of a sampled request, when its parsing, gate and quota were over.
        self._clock = 0
        self._is_sampled = False
        self._started = self._gated = self._passed = 0

    def run(self, budget: int) -> int:
        """Serves up to `budget` requests and publishes them. Returns IDLE, SPENT, WAIT (the limiter says how long),
        CROWDED, or the head of a taken chain for the general path.

        Errors: QueueError from the vring; what was begun goes on.
        """
        vring = self.vring
        flight = self.flight
        self.served = 0
        if flight.in_flight:
            flight.reap()
        try:
            while self.served < budget:
                if self.limiter.is_on:
                    if self._is_full():
                        vring.publish()
                        return CROWDED
                    if self._must_wait():
                        flight.submit()
                        vring.publish()
                        return WAIT
                head = vring.take()
                if head < 0:
                    flight.submit()
                    if flight.in_flight:
                        flight.reap()  # what was in the page cache after all is back already
                    vring.publish()
                    if self._poll():
                        continue
                    if vring.arm():
                        continue
                    return IDLE
                self.served += 1
                if self.limiter.is_on:
                    # Whatever becomes of it: what is refused cost us the same look.
                    size = vring.readable_bytes + vring.writable_bytes
                    self.limiter.take(size - FRAME_BYTES if size > FRAME_BYTES else 0)
                if not self._serve(head):
                    return head
                if self.served % self.publish_every == 0:
                    vring.publish()
        finally:
            flight.submit()
        vring.publish()
        return SPENT

    def _is_full(self) -> bool:
        if not self.limiter.is_full():
            return False
        self.flight.submit()
        self.flight.reap()
        return self.limiter.is_full()

    def _must_wait(self) -> bool:
        if self.limiter.wait(self._clock * 1e-9) <= 0.0:
            return False
        # Only now it is worth a look at the clock.
        self._clock = now_ns()
        return self.limiter.wait(self._clock * 1e-9) > 0.0

    def _poll(self) -> bool:
        """Look at the queue for a while, within the budget; True when something came."""
        wait = self.poll_ns
        if self.served > 1 and self.flight.in_flight == 0 and wait < self.linger_ns:
            wait = self.linger_ns
        if wait == 0:
            return False
        start = now_ns()
        self._poll_credit += (start - self._poll_stamp) >> POLL_SHARE_SHIFT
        if self._poll_credit > POLL_SAVED_NS:
            self._poll_credit = POLL_SAVED_NS
        self._poll_stamp = start
        if self._poll_credit < wait:
            return False
        while now_ns() - start < wait:
            if self.vring.is_waiting():
                return True
            if self.flight.in_flight:
                self.flight.reap()
                self.vring.publish()
        self._poll_credit -= wait
        return False

    def _serve(self, head: int) -> bool:
        vring = self.vring
        count = vring.count
        self._is_sampled = (self.served - 1) & self.stats.sample_mask == 0
        if self._is_sampled:
            self._started = self._gated = self._passed = now_ns()
        if vring.writable_bytes == 0 or vring.readable_bytes < HEADER_BYTES:
            vring.chain_errors += 1
            if vring.writable_bytes:
                at = vring.starts[count - 1] + vring.lengths[count - 1] - 1
                vring.regions[count - 1].view[at] = STATUS_IOERR
            self.complete(head, 0)
            return True
        self._read_header()
        self.buffers.clear()
        split = vring.readable_count
        if self.kind == TYPE_IN:
            length = vring.writable_bytes - 1
            is_whole = self._collect(split, count, 0, length)
            operation = READ_OP
        elif self.kind == TYPE_OUT:
            length = vring.readable_bytes - HEADER_BYTES
            is_whole = self._collect(0, split, HEADER_BYTES, length)
            operation = WRITE_OP
        else:
            return False
        if length & SECTOR_MASK or length > self.max_bytes or self.sector > self.size_bytes >> SECTOR_SHIFT:
            return False
        self.offset = self.sector << SECTOR_SHIFT
        if (
            self.is_watched
            or not is_whole
            or self.offset + length > self.size_bytes
            or not self.gate.allows(operation)
        ):
            return False
        if self._is_sampled:
            self._gated = self._passed = now_ns()
        if operation == WRITE_OP:
            if self.read_only or length > self.headroom:
                return False
            self.headroom -= length
            if self._is_sampled:
                self._passed = now_ns()
        if self.is_direct and not self.buffers.is_aligned(SECTOR_MASK):
            return False
        self.perform(head)
        return True

    def perform(self, head: int) -> None:
        """Do the read or write that was parsed last, which may happen: at once when that is quick, else in flight."""
        vring = self.vring
        length = self.buffers.total
        if length == 0:
            done = 0
        elif self.is_direct or not self.flight.is_async or (self.is_durable and self.kind == TYPE_OUT):
            done = LATER
        elif self.kind == TYPE_OUT:
            done = self._write_now()
        else:
            done = self._read_now()
        last = vring.count - 1
        region = vring.regions[last]
        at = vring.starts[last] + vring.lengths[last] - 1
        if done == length:
            operation = READ_OP if self.kind == TYPE_IN else WRITE_OP
            region.ram[at] = STATUS_OK
            self.stats.count(operation, length)
            if self._is_sampled:
                self._sample(operation, length)
            self.complete(head, vring.writable_bytes)
            return
        request = self.flight.claim()
        spare = request.buffers
        request.buffers = self.buffers
        self.buffers = spare
        request.kind = READ if self.kind == TYPE_IN else WRITE
        request.head = head
        request.written = vring.writable_bytes
        request.offset = self.offset
        request.length = length
        request.growth = length if request.kind == WRITE else 0
        if self._is_sampled:
            request.started = self._started
            request.gated = self._gated - self._started
            request.passed = self._passed - self._gated
        request.is_durable = self.is_durable
        request.region = region
        request.status_at = at
        if done < 0 and done != LATER and done != -EOPNOTSUPP and done != -EINTR:
            request.error = -done
        self.flight.add(request)

    def _read_now(self) -> int:
        """Reads from the page cache and returns the number of bytes; fewer than asked, or minus errno, when the disk
        has to be asked.
        """
        if self._misses >= MISS_STREAK and self._misses & RETRY_MASK:
            self._misses += 1
            return LATER
        if not self._can_peek:
            return LATER
        done = self.buffers.read(self.fd, self.offset, RWF_NOWAIT)
        if done == self.buffers.total:
            self._misses = 0
        else:
            self._misses += 1
            if done == -EOPNOTSUPP:
                self._can_peek = False  # a file system that cannot tell
        return done

    def _write_now(self) -> int:
        started = now_ns()
        if started < self._slow_until:
            return LATER
        done = self.buffers.write(self.fd, self.offset, 0)
        self._clock = now_ns()
        if self._clock - started > SLOW_NS:
            self._slow_until = self._clock + SLOW_PAUSE_NS
        return done

    def pass_quota(self) -> None:
        """The general path found that the request is within the quota."""
        if self._is_sampled:
            self._passed = now_ns()

    def _sample(self, operation: int, length: int) -> None:
        self._clock = now_ns()
        self.stats.sample(operation, self._clock - self._started, length, self._clock)
        self.stats.profile(
            operation, self._gated - self._started, self._passed - self._gated, 0, self._clock - self._passed
        )

    def complete(self, head: int, written: int) -> None:
        """A request is over, its status written: tell it in its turn."""
        flight = self.flight
        if flight.in_flight == 0:
            self.vring.push(head, written)
            return
        request = flight.claim()
        request.kind = OVER
        request.head = head
        request.written = written
        flight.add(request)

    def claim(self, head: int, kind: int) -> DiskRequest:
        """A request of another kind for the chain that was taken last; the caller fills the rest and adds it."""
        vring = self.vring
        last = vring.count - 1
        request = self.flight.claim()
        request.kind = kind
        request.head = head
        request.written = vring.writable_bytes
        request.region = vring.regions[last]
        request.status_at = vring.starts[last] + vring.lengths[last] - 1
        request.is_durable = self.is_durable
        return request

    def _read_header(self) -> None:
        """Type and sector, each read once, wherever the driver put them."""
        vring = self.vring
        region = vring.regions[0]
        at = vring.starts[0]
        if vring.lengths[0] >= HEADER_BYTES and not at & 7 and at + HEADER_BYTES <= region.size & ~15:
            self.kind = region.ram32[at >> 2]
            self.sector = region.ram64[(at + 8) >> 3]
            return
        header = self._header
        done = 0
        index = 0
        while done < HEADER_BYTES:
            region = vring.regions[index]
            at = vring.starts[index]
            end = at + vring.lengths[index]
            while at < end and done < HEADER_BYTES:
                header[done] = region.ram[at]
                at += 1
                done += 1
            index += 1
        self.kind = header[0] | header[1] << 8 | header[2] << 16 | header[3] << 24
        self.sector = 0
        for index in range(8):
            self.sector = self.sector << 8 | header[15 - index]

    def _collect(self, first: int, end: int, skip: int, limit: int) -> bool:
        """The buffers `first` to `end` of the chain behind `skip` bytes, at most `limit` bytes; False: too many."""
        vring = self.vring
        for index in range(first, end):
            start = vring.starts[index]
            length = vring.lengths[index]
            if skip:
                if skip >= length:
                    skip -= length
                    continue
                start += skip
                length -= skip
                skip = 0
            if length > limit:
                length = limit
            if length:
                region = vring.regions[index]
                if not self.buffers.add(region.address + start, length):
                    return False
                limit -= length
        return True

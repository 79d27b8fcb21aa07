"""The block device: requests off the ring, onto a store (VIRTIO 1.3, 5.2.6).

A guest's write travels: kick -> `BlkRing.run` -> range, gate and quota -> the page cache or io_uring -> status -> used
ring. Here is what is not hot: other requests, refusals, the quota's measuring. Requests are told to the driver in the
order of the ring, so after a crash the used index says exactly which ones are still to be done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Final

from rayos_devices.backend import Backend
from rayos_devices.blk.flight import Flight
from rayos_devices.blk.kinds import CROWDED, FORMAT, IDLE, LINGER_NS, SPENT, SYNC, WAIT
from rayos_devices.blk.ring import BlkRing
from rayos_devices.blk.store import DISCARD, ZERO, RawStore
from rayos_devices.blk.wire import (
    HEADER,
    ID_BYTES,
    SECTOR_BYTES,
    SEGMENT,
    SEGMENT_FLAG_UNMAP,
    WRITEBACK_OFFSET,
    BlkFeature,
    Config,
    RequestType,
    Status,
)
from rayos_devices.bucket import Limiter, lower
from rayos_devices.errors import RequestError
from rayos_devices.faults import Faults
from rayos_devices.gate import OPEN, Denial, Gate, Op
from rayos_devices.levels import Level
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.native import now_ns
from rayos_devices.stats import Stats
from rayos_devices.uring import Uring
from rayos_devices.virtio.chain import Chain, slice_views
from rayos_devices.virtio.features import DeviceId
from rayos_devices.virtio.vring import Vring

#: Data buffers of one request: what fits an indirect table of 128 beside header and status.
SEG_MAX: Final = 126
#: Bytes one request may move: SEG_MAX buffers of 1 MiB.
MAX_REQUEST_BYTES: Final = SEG_MAX << 20
MAX_SEGMENTS: Final = 16
#: Sectors one discard or write-zeroes segment may cover: 1 GiB.
MAX_SEGMENT_SECTORS: Final = (1 << 30) // SECTOR_BYTES
BLOCK_BYTES: Final = 4096
#: Requests handed to the kernel at a time; more may be on their way.
URING_ENTRIES: Final = 128
#: After how many requests the driver is told, if it wants: its ring's own, which is a C constant there.
PUBLISH_EVERY: Final = 4
#: How long level 3 looks at an empty queue.
POLL_NS: Final = 50_000
#: Headroom of a disk without a quota.
UNBOUNDED: Final = 1 << 62
#: The requests that can fail on purpose, and what `devices.faults` calls them.
_FAULTY: Final[dict[int, tuple[Op, str]]] = {
    RequestType.IN: (Op.DISK_READ, "read"),
    RequestType.OUT: (Op.DISK_WRITE, "write"),
    RequestType.FLUSH: (Op.DISK_FLUSH, "flush"),
}


class UnsupportedRequest(RequestError):
    """A request that ends with VIRTIO_BLK_S_UNSUPP (VIRTIO 1.3, 5.2.6)."""


class BlkBackend(Backend):
    """`quota_bytes` bounds the storage the image may take (not the traffic); None is unbounded. `poll_ns` is how long
    an empty queue may be looked at before the loop sleeps; that costs at most an eighth of a CPU. `block_bytes` is the
    logical block that the driver is told; the protocol's unit is 512 whatever it says.
    """

    device_id = DeviceId.BLOCK
    BUDGET: ClassVar[int] = 128
    LIMITS = (Limit.RATE, Limit.OPERATIONS, Limit.STORAGE)

    def __init__(
        self,
        name: str,
        loop: Loop,
        store: RawStore,
        *,
        serial: str = "",
        queues: int = 1,
        quota_bytes: int | None = None,
        poll_ns: int = 0,
        block_bytes: int = SECTOR_BYTES,
        gate: Gate = OPEN,
    ) -> None:
        stats = Stats(Op.DISK_READ, Op.DISK_WRITE, Op.DISK_FLUSH, Op.DISK_FORMAT)
        super().__init__(name, queues, loop, stats, gate)
        self.store = store
        self.quota_bytes = quota_bytes
        self._serial = serial.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._block_bytes = block_bytes
        self._no_uring = ""
        self._limiter = Limiter()
        self._operations_per_second = self._bytes_per_second = self._ceiling = 0.0
        self._poll_ns = poll_ns
        self._held_back: list[int] = []
        self.faults: Faults | None = None
        self._stalls: dict[int, int] = {}  # the timer of each queue whose next request is late on purpose
        self._late: set[int] = set()  # queues whose next request has been late
        self._timer = 0
        self._rings = [self._make_ring(vring, poll_ns) for vring in self.queues]
        self._set_headroom(UNBOUNDED if quota_bytes is None else 0)
        self._wants_writeback = True

    def config_space(self) -> bytes:
        return Config(
            capacity_sectors=self.store.size_bytes // SECTOR_BYTES,
            seg_max=SEG_MAX,
            block_size_bytes=self._block_bytes,
            physical_block_exponent=3 if self._block_bytes == SECTOR_BYTES else 0,
            optimal_io_blocks=256 * SECTOR_BYTES // self._block_bytes,
            queues=len(self.queues),
            max_discard_sectors=MAX_SEGMENT_SECTORS,
            max_discard_segments=MAX_SEGMENTS,
            discard_alignment_sectors=BLOCK_BYTES // SECTOR_BYTES,
            max_write_zeroes_sectors=MAX_SEGMENT_SECTORS,
            max_write_zeroes_segments=MAX_SEGMENTS,
            writeback=self._wants_writeback,
        ).pack()

    def write_config(self, offset: int, data: bytes) -> None:
        """5.2.5: `writeback`, 0 or 1, is the driver's choice."""
        if offset == WRITEBACK_OFFSET and data in (b"\0", b"\1"):
            self._wants_writeback = data == b"\1"
            self._choose_cache()

    def set_features(self, features: int) -> None:
        super().set_features(features)
        self._choose_cache()

    def _choose_cache(self) -> None:
        """5.2.6.2: a driver without FLUSH counts on every write, and so does one that chose write-through."""
        acked = self.acked_features
        if self.store.is_unsafe:
            return
        is_durable = not acked & BlkFeature.FLUSH or (
            bool(acked & BlkFeature.CONFIG_WCE) and not self._wants_writeback
        )
        if is_durable and not self._rings[0].is_durable and acked & BlkFeature.FLUSH:
            # What was answered before counts from now on, too. A failure is latched, and told with the next write.
            with suppress(OSError):
                self.store.sync()
        for ring in self._rings:
            ring.is_durable = is_durable

    def resize(self) -> int:
        """Tells the guest that the image has grown and returns its size in bytes. It is told again even if it knew: a
        worker that was started meanwhile has the new size from its beginning, and its predecessor may not have told
        the guest.

        Errors: RequestError when the image is smaller than it was.
        """
        self.store.grow()
        for ring in self._rings:
            ring.size_bytes = self.store.size_bytes
        self.tell_config_change()
        return self.store.size_bytes

    @property
    def features(self) -> int:
        own = (
            BlkFeature.SEG_MAX
            | BlkFeature.BLK_SIZE
            | BlkFeature.FLUSH
            | BlkFeature.TOPOLOGY
            | BlkFeature.CONFIG_WCE
            | BlkFeature.DISCARD
            | BlkFeature.WRITE_ZEROES
        )
        if len(self.queues) > 1:
            own |= BlkFeature.MQ
        if self.store.read_only:
            own = (own | BlkFeature.RO) & ~(BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES)
        return super().features | own

    def _make_ring(self, vring: Vring, poll_ns: int) -> BlkRing:
        vring.fault_status = Status.IOERR
        uring: Uring | None = None
        try:
            uring = Uring(URING_ENTRIES)
        except OSError as error:  # forbidden (seccomp, sysctl), or too old
            self._no_uring = f"synchronous: no io_uring ({error})"
        else:
            self.loop.register(uring.fd, lambda _events: self._completed(vring.index))
        flight = Flight(vring, self.store, self.stats, self._limiter, uring)
        ring = BlkRing(vring, flight, self.gate, self._limiter, self.store.size_bytes, MAX_REQUEST_BYTES)
        ring.read_only = self.store.read_only
        ring.is_direct = self.store.is_direct
        ring.poll_ns = poll_ns
        return ring

    def process(self, queue: int) -> bool:
        ring = self._rings[queue]
        if queue in self._stalls:  # what is on its way comes back all the same
            ring.flight.reap()
            self.queues[queue].publish()
            return False
        budget = self.BUDGET
        while budget > 0:
            outcome = ring.run(budget)
            if outcome == IDLE:
                return False
            if outcome == SPENT:
                return True
            if outcome in (WAIT, CROWDED):
                self._hold_back(queue, outcome)
                return False
            budget -= ring.served
            if self.faults is None or not self._is_hit(ring, outcome, self.faults):
                self._serve(ring, outcome)
            elif queue in self._stalls:
                self.queues[queue].publish()
                return False
        self.queues[queue].publish()
        return True

    def _completed(self, queue: int) -> None:
        if self._limiter.at_once and self._held_back and not self._timer:
            # Its requests that are over make room for those that wait the longest.
            self._rings[queue].flight.reap()
            self.queues[queue].publish()
            if queue not in self._held_back:
                self._held_back.append(queue)
            self._go_on()
        elif self.run_queue(queue):
            self.loop.call_soon(lambda: self._completed(queue))

    def stop_queue(self, queue: int) -> None:
        """Waits for the requests that the disk still works on: they write into the guest's memory."""
        ring = self._rings[queue]
        ring.flight.drain()
        self.queues[queue].publish()
        if queue in self._held_back:
            self._held_back.remove(queue)
        if timer := self._stalls.pop(queue, 0):
            self.loop.cancel(timer)
        self._late.discard(queue)

    # -- faults --------------------------------------------------------------------------------------------------

    def set_faults(self, faults: Faults | None) -> None:
        """From now on requests go wrong as `faults` says (ops read, write and flush); None: no more."""
        self.faults = faults
        for ring in self._rings:
            ring.is_watched = faults is not None

    def _is_hit(self, ring: BlkRing, head: int, faults: Faults) -> bool:
        """Returns whether a fault took the request that `ring` has parsed and left. A fault answers with an error, or
        gives the request back to the queue for as long as it is late.
        """
        queue = ring.vring.index
        if queue in self._late:
            self._late.discard(queue)
            return False
        chain = ring.vring.chain(head)
        if ring.kind not in _FAULTY:
            return False
        op, word = _FAULTY[ring.kind]
        size = max(chain.writable_bytes - 1, chain.readable_bytes - HEADER.size)
        fault = faults.decide(word, ring.sector, size // SECTOR_BYTES)
        if fault is None:
            return False
        if fault.action == "error":
            self.stats.deny(op, Denial.IO_ERROR)
            self._answer(ring, chain, Status.IOERR)
            return True
        ring.vring.unpop(head)
        self._stalls[queue] = self.loop.call_at(
            self.loop.now() + fault.delay_s, lambda: self._end_stall(queue)
        )
        return True

    def _end_stall(self, queue: int) -> None:
        del self._stalls[queue]
        self._late.add(queue)
        self._completed(queue)

    # -- limits --------------------------------------------------------------------------------------------------

    def set_limits(self, *, operations_per_second: float = 0.0, bytes_per_second: float = 0.0) -> None:
        """Shape all queues together from now on; 0 is unbounded. Nothing is refused: requests wait in their ring.

        Errors: ValueError for a negative limit.
        """
        if operations_per_second < 0 or bytes_per_second < 0:
            raise ValueError(
                f"limits of {operations_per_second} and {bytes_per_second}: at least 0 is allowed"
            )
        self._operations_per_second, self._bytes_per_second = operations_per_second, bytes_per_second
        self._shape()

    def limit_rate(self, bytes_per_second: float) -> None:
        """Whatever the limits are, no faster than this; 0 is as fast as they allow."""
        self._ceiling = bytes_per_second
        self._shape()

    def limit_concurrency(self, count: int) -> None:
        """Requests that the disk may work on at once, of all queues; 0 is unbounded. The others wait in their ring."""
        self._limiter.set_at_once(count)
        self._go_on()

    def apply_ceilings(self, ceilings: Mapping[str, int]) -> None:
        self.limit_rate(float(ceilings["disk_rate"]))
        self.limit_concurrency(ceilings["disk_at_once"])
        self.cap_limit(Limit.STORAGE, ceilings["disk_size"])

    def listen_fullness(self, on_full: Callable[[str], None]) -> None:
        self.store.on_full = on_full

    @property
    def storage(self) -> tuple[int, int | None]:
        return self.store.allocated_bytes, self.quota_bytes

    def _shape(self) -> None:
        now = self.loop.now()
        self._limiter.set(self._operations_per_second, lower(self._bytes_per_second, self._ceiling), now=now)
        if self._timer:
            self.loop.cancel(self._timer)
            self._timer = self.loop.call_at(now, self._go_on)

    @property
    def depth(self) -> int:
        return sum(ring.flight.in_flight for ring in self._rings) + len(self._held_back)

    def limit(self, limit: Limit) -> int:
        match limit:
            case Limit.RATE:
                return round(self._bytes_per_second)
            case Limit.OPERATIONS:
                return round(self._operations_per_second)
            case _:
                return self.quota_bytes or 0

    def apply_limit(self, limit: Limit, value: int) -> None:
        match limit:
            case Limit.RATE:
                self.set_limits(operations_per_second=self._operations_per_second, bytes_per_second=value)
            case Limit.OPERATIONS:
                self.set_limits(operations_per_second=value, bytes_per_second=self._bytes_per_second)
            case _:
                self.quota_bytes = value or None
                self._set_headroom(0 if value else UNBOUNDED)

    def set_level(self, level: int) -> None:
        super().set_level(level)
        for ring in self._rings:
            ring.publish_every = PUBLISH_EVERY if level >= Level.BATCHING else 1
            ring.linger_ns = LINGER_NS if level >= Level.BATCHING else 0
            ring.poll_ns = max(self._poll_ns, POLL_NS) if level >= Level.POLLING else self._poll_ns

    def _hold_back(self, queue: int, outcome: int) -> None:
        if queue not in self._held_back:
            self._held_back.append(queue)
            self._limiter.waits += 1
        if outcome == WAIT and not self._timer:  # CROWDED ends with a request
            now = self.loop.now()
            self._timer = self.loop.call_at(now + self._limiter.wait(now), self._go_on)

    def _go_on(self) -> None:
        """Who gets nothing now is first the next time: else one queue would take it all."""
        self._timer = 0
        waiting, self._held_back = self._held_back, []
        served = []
        for queue in waiting:
            before = self.queues[queue].requests
            if self.run_queue(queue):
                self.loop.call_soon(lambda queue=queue: self._completed(queue))  # type: ignore[misc]
            if self.queues[queue].requests != before:
                served.append(queue)
        self._held_back.sort(key=served.__contains__)

    def _serve(self, ring: BlkRing, head: int) -> None:
        """Do the request that `ring` has parsed and left."""
        chain = ring.vring.chain(head)
        kind = ring.kind
        try:
            if kind == RequestType.IN:
                self._check(Op.DISK_READ, ring.sector, chain.writable_bytes - 1)
                self._transfer(ring, chain, Op.DISK_READ)
            elif kind == RequestType.OUT:
                length = chain.readable_bytes - HEADER.size
                self._check(Op.DISK_WRITE, ring.sector, length)
                self._check_quota(ring.sector * SECTOR_BYTES, length)
                ring.pass_quota()
                self._transfer(ring, chain, Op.DISK_WRITE)
            elif kind == RequestType.FLUSH:
                self._flush(ring, head)
            elif kind == RequestType.GET_ID:
                self._get_id(chain, chain.writable_bytes - 1)
                self._answer(ring, chain, Status.OK)
            elif kind in (RequestType.DISCARD, RequestType.WRITE_ZEROES):
                self._format(ring, chain, is_discard=kind == RequestType.DISCARD)
            else:
                raise UnsupportedRequest(f"request type {kind}")
        except UnsupportedRequest:
            self._answer(ring, chain, Status.UNSUPP)
        except (RequestError, OSError):
            self._answer(ring, chain, Status.IOERR)

    @staticmethod
    def _answer(ring: BlkRing, chain: Chain, status: Status) -> None:
        last = chain.writable[-1]
        last[len(last) - 1] = status
        ring.complete(chain.head, chain.writable_bytes)

    def _transfer(self, ring: BlkRing, chain: Chain, op: Op) -> None:
        """A read or write that may happen but was too odd for the ring, or new to the quota."""
        is_read = op is Op.DISK_READ
        length = chain.writable_bytes - 1 if is_read else chain.readable_bytes - HEADER.size
        is_odd = self.store.is_direct and not ring.buffers.is_aligned(SECTOR_BYTES - 1)
        if ring.buffers.total == length and not is_odd:
            ring.perform(chain.head)
            return
        offset = ring.sector * SECTOR_BYTES
        try:
            if is_read:
                self.store.read(slice_views(chain.writable, 0, length), offset)
            else:
                self.store.write(slice_views(chain.readable, HEADER.size, length), offset)
                if ring.is_durable:
                    self.store.sync()
        except OSError as error:
            self.stats.deny(op, self.store.denial(error.errno or 0), length)
            raise
        except RequestError:
            self.stats.deny(op, Denial.IO_ERROR, length)
            raise
        self.stats.allow(op, length)
        self._answer(ring, chain, Status.OK)

    def _check(self, op: Op, sector: int, length: int) -> None:
        """Range, read-only and gate, in the order of cost."""
        denial: Denial | None
        if (
            length % SECTOR_BYTES
            or length > MAX_REQUEST_BYTES
            or sector * SECTOR_BYTES + length > self.store.size_bytes
        ):
            denial = Denial.INVALID
        elif self.store.read_only and op is not Op.DISK_READ:
            denial = Denial.READ_ONLY
        else:
            denial = self.gate.check(op, length)
        if denial is not None:
            self.stats.deny(op, denial, length)
            raise RequestError(
                f"{op.value} of {length} bytes at sector {sector} ({denial.value}): "
                f"the disk has {self.store.size_bytes // SECTOR_BYTES} sectors"
            )

    def _check_quota(self, offset: int, length: int) -> None:
        """Refuse what could take the image over its quota; measures only when the known headroom is used up."""
        if self.quota_bytes is None:
            return
        headroom = sum(ring.headroom for ring in self._rings)
        if length > headroom:
            if self.store.is_allocated(offset, length):
                return
            on_its_way = sum(ring.flight.growth for ring in self._rings)
            headroom = max(0, self.quota_bytes - self.store.allocated_bytes - on_its_way)
            if length > headroom:
                self.stats.deny(Op.DISK_WRITE, Denial.QUOTA, length)
                self.store.on_full("quota")
                raise RequestError(
                    f"a write of {length} bytes would exceed the quota of {self.quota_bytes} bytes"
                )
        self._set_headroom(headroom - length)

    def _set_headroom(self, size_bytes: int) -> None:
        """Sets how many bytes may be written before the image is measured again, shared evenly by the queues' loops."""
        for ring in self._rings:
            ring.headroom = size_bytes // len(self._rings)

    def _get_id(self, chain: Chain, room: int) -> None:
        """As much of the identifier as there is room for; QEMU cuts it, too."""
        chain.write(self._serial[:room])

    def _flush(self, ring: BlkRing, head: int) -> None:
        denial = self.gate.check(Op.DISK_FLUSH, 0)
        if denial is not None:
            self.stats.deny(Op.DISK_FLUSH, denial)
            raise RequestError(f"flush refused: {denial.value}")
        ring.flight.add(ring.claim(head, SYNC))

    def _format(self, ring: BlkRing, chain: Chain, *, is_discard: bool) -> None:
        """DISCARD and WRITE_ZEROES (5.2.6.2): every segment is checked before the first is touched."""
        if not self.acked_features & (BlkFeature.DISCARD if is_discard else BlkFeature.WRITE_ZEROES):
            raise UnsupportedRequest("the driver has not acked the feature")
        length = chain.readable_bytes - HEADER.size
        count, rest = divmod(length, SEGMENT.size)
        if rest or not 1 <= count <= MAX_SEGMENTS:
            self.stats.deny(Op.DISK_FORMAT, Denial.INVALID)
            raise RequestError(
                f"{length} bytes of segments: 1 to {MAX_SEGMENTS} of {SEGMENT.size} are allowed"
            )
        data = chain.read(length, HEADER.size)
        segments = list(SEGMENT.iter_unpack(data))
        for sector, sectors, flags in segments:
            if flags & ~SEGMENT_FLAG_UNMAP or (is_discard and flags):
                self.stats.deny(Op.DISK_FORMAT, Denial.INVALID)
                raise UnsupportedRequest(f"a segment with flags {flags:#x}")
            if sectors > MAX_SEGMENT_SECTORS:
                self.stats.deny(Op.DISK_FORMAT, Denial.INVALID)
                raise RequestError(
                    f"a segment of {sectors} sectors: at most {MAX_SEGMENT_SECTORS} are allowed"
                )
            self._check_format(sector, sectors)
        request = ring.claim(chain.head, FORMAT)
        request.segments = []
        for sector, sectors, flags in segments:
            offset, size = sector * SECTOR_BYTES, sectors * SECTOR_BYTES
            is_kept = not is_discard and not flags & SEGMENT_FLAG_UNMAP
            if is_kept and sectors:
                try:
                    self._check_quota(offset, size)
                except RequestError:
                    ring.flight.release(request)
                    raise
            if sectors:
                request.segments.append((ZERO if is_kept else DISCARD, offset, size))
                request.length += size
                request.growth += size if is_kept else 0
        if self.quota_bytes is not None:
            self._set_headroom(0)
        request.started = now_ns()
        ring.flight.add(request)

    def _check_format(self, sector: int, sectors: int) -> None:
        denial: Denial | None = None
        if (sector + sectors) * SECTOR_BYTES > self.store.size_bytes:
            denial = Denial.INVALID
        elif self.store.read_only:
            denial = Denial.READ_ONLY
        else:
            denial = self.gate.check(Op.DISK_FORMAT, sectors * SECTOR_BYTES)
        if denial is not None:
            self.stats.deny(Op.DISK_FORMAT, denial)
            raise RequestError(f"{sectors} sectors at {sector} ({denial.value})")

    def snapshot(self) -> dict[str, Any]:
        return {
            **super().snapshot(),
            "size_bytes": self.store.size_bytes,
            "cache": "unsafe"
            if self.store.is_unsafe
            else "write through"
            if self._rings[0].is_durable
            else "write back",
            "io": self._no_uring or "io_uring",
            "quota": {
                "storage_bytes": self.store.allocated_bytes,
                "limit_bytes": self.quota_bytes,
                "operations_per_second": self._limiter.operations_per_second,
                "bytes_per_second": self._limiter.bytes_per_second,
                "requests_at_once": self._limiter.at_once,
                "waits": self._limiter.waits,
            },
        }

    def finish(self) -> None:
        for ring in self._rings:
            ring.flight.drain()
        for vring in self.queues:
            if vring.attached:
                vring.publish()

    def close(self) -> None:
        if self._timer:
            self.loop.cancel(self._timer)
        for ring in self._rings:
            ring.flight.drain()
            if ring.flight.is_async:
                self.loop.unregister(ring.flight.uring.fd)
                ring.flight.uring.close()
        self.store.close()

"""The block device: requests off the ring, onto a store (VIRTIO 1.3, 5.2.6).

A guest's write travels: kick -> `process` -> `_write` -> gate and quota -> `RawStore.write` -> status -> used ring.
Requests complete in order, so after a crash the used index says exactly which ones are still to be done.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar, Final

from devices.backend import Backend
from devices.blk.ring import BlkRing
from devices.blk.store import RawStore
from devices.blk.wire import (
    HEADER,
    ID_BYTES,
    SECTOR_BYTES,
    SEGMENT,
    SEGMENT_FLAG_UNMAP,
    BlkFeature,
    Config,
    RequestType,
    Status,
)
from devices.errors import RequestError
from devices.gate import OPEN, Denial, Gate, Op
from devices.loop import Loop
from devices.stats import Stats
from devices.virtio.chain import Chain, slice_views
from devices.virtio.features import DeviceId
from devices.virtio.layout import NOTHING

#: Data buffers of one request: what fits an indirect table of 128 beside header and status.
SEG_MAX: Final = 126
#: Bytes of one buffer.
SIZE_MAX: Final = 1 << 20
#: Bytes one request may move: SEG_MAX buffers of SIZE_MAX.
MAX_REQUEST_BYTES: Final = SEG_MAX * SIZE_MAX
MAX_SEGMENTS: Final = 16
#: Sectors one discard or write-zeroes segment may cover: 1 GiB.
MAX_SEGMENT_SECTORS: Final = (1 << 30) // SECTOR_BYTES
BLOCK_BYTES: Final = 4096
#: Headroom of a disk without a quota.
UNBOUNDED: Final = 1 << 62


class BlkBackend(Backend):
    """`quota_bytes` bounds the storage the image may take (not the traffic); None is unbounded."""

    device_id = DeviceId.BLOCK
    BUDGET: ClassVar[int] = 128

    def __init__(
        self,
        name: str,
        loop: Loop,
        store: RawStore,
        *,
        serial: str = "",
        queues: int = 1,
        quota_bytes: int | None = None,
        gate: Gate = OPEN,
    ) -> None:
        stats = Stats(Op.DISK_READ, Op.DISK_WRITE, Op.DISK_FLUSH, Op.DISK_FORMAT)
        super().__init__(name, queues, loop, stats, gate)
        self.store = store
        self.quota_bytes = quota_bytes
        self._serial = serial.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._rings = [
            BlkRing(vring, store.fd, store.size_bytes, stats, gate, MAX_REQUEST_BYTES)
            for vring in self.queues
        ]
        for ring in self._rings:
            ring.read_only = store.read_only
        self._set_headroom(UNBOUNDED if quota_bytes is None else 0)
        self._config = Config(
            capacity_sectors=store.size_bytes // SECTOR_BYTES,
            size_max_bytes=SIZE_MAX,
            seg_max=SEG_MAX,
            block_size_bytes=SECTOR_BYTES,
            physical_block_exponent=3,
            optimal_io_blocks=256,
            queues=queues,
            max_discard_sectors=MAX_SEGMENT_SECTORS,
            max_discard_segments=MAX_SEGMENTS,
            discard_alignment_sectors=BLOCK_BYTES // SECTOR_BYTES,
            max_write_zeroes_sectors=MAX_SEGMENT_SECTORS,
            max_write_zeroes_segments=MAX_SEGMENTS,
        ).pack()

    @property
    def features(self) -> int:
        own = (
            BlkFeature.SIZE_MAX
            | BlkFeature.SEG_MAX
            | BlkFeature.BLK_SIZE
            | BlkFeature.FLUSH
            | BlkFeature.TOPOLOGY
            | BlkFeature.DISCARD
            | BlkFeature.WRITE_ZEROES
        )
        if len(self.queues) > 1:
            own |= BlkFeature.MQ
        if self.store.read_only:
            own = (own | BlkFeature.RO) & ~(BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES)
        return super().features | own

    def config_space(self) -> bytes:
        return self._config

    def process(self, queue: int) -> bool:
        vring = self.queues[queue]
        ring = self._rings[queue]
        budget = self.BUDGET
        while budget > 0:
            outcome = ring.drain(budget)
            budget -= ring.served
            if outcome >= 0:
                vring.push(outcome, self._serve(vring.chain(outcome)))
            elif outcome == NOTHING:
                vring.publish()
                if not vring.arm():
                    return False
        vring.publish()
        return True

    def stop_queue(self, queue: int) -> None:
        # The last request's buffers are views: they would keep the guest's memory mapped.
        self._rings[queue].buffers.clear()

    def _serve(self, chain: Chain) -> int:
        """Do one request and write its status; returns the bytes written, 0 for a chain without a place for it."""
        if chain.writable_bytes == 0 or chain.readable_bytes < HEADER.size:
            self.queues[0].chain_errors += 1
            return 0
        room = chain.writable_bytes - 1
        number, _, sector = HEADER.unpack(chain.read(HEADER.size))
        try:
            if number == RequestType.IN:
                self._read(chain, sector, room)
            elif number == RequestType.OUT:
                self._write(chain, sector)
            elif number == RequestType.FLUSH:
                self._flush()
            elif number == RequestType.GET_ID:
                self._get_id(chain, room)
            elif number in (RequestType.DISCARD, RequestType.WRITE_ZEROES):
                self._format(chain, is_discard=number == RequestType.DISCARD)
            else:
                raise NotImplementedError
            status = Status.OK
        except NotImplementedError:
            status = Status.UNSUPP
        except (RequestError, OSError):
            status = Status.IOERR
        last = chain.writable[-1]
        last[len(last) - 1] = status
        return chain.writable_bytes

    def _read(self, chain: Chain, sector: int, length: int) -> None:
        self._check(Op.DISK_READ, sector, length)
        buffers = chain.writable
        # All but the status byte, the very last one.
        buffers = buffers[:-1] if len(buffers[-1]) == 1 else slice_views(buffers, 0, length)
        try:
            self.store.read(buffers, sector * SECTOR_BYTES)
        except OSError:
            self.stats.deny(Op.DISK_READ, Denial.IO_ERROR)
            raise
        self.stats.allow(Op.DISK_READ, length)

    def _write(self, chain: Chain, sector: int) -> None:
        length = chain.readable_bytes - HEADER.size
        self._check(Op.DISK_WRITE, sector, length)
        self._check_quota(sector * SECTOR_BYTES, length)
        buffers = chain.readable
        buffers = buffers[1:] if len(buffers[0]) == HEADER.size else slice_views(buffers, HEADER.size, length)
        try:
            self.store.write(buffers, sector * SECTOR_BYTES)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            self.stats.deny(Op.DISK_WRITE, Denial.QUOTA if full else Denial.IO_ERROR)
            raise
        self.stats.allow(Op.DISK_WRITE, length)

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
            self.stats.deny(op, denial)
            raise RequestError(
                f"{op.value} of {length} bytes at sector {sector} ({denial.value}): "
                f"the disk has {self.store.size_bytes // SECTOR_BYTES} sectors"
            )

    def _check_quota(self, offset: int, length: int) -> None:
        """Refuse what could take the image over its quota; measures only when the known headroom is used up."""
        if self.quota_bytes is None:
            return
        headroom = self._rings[0].headroom
        if length > headroom:
            if self.store.is_allocated(offset, length):
                return
            headroom = max(0, self.quota_bytes - self.store.allocated_bytes)
            if length > headroom:
                self.stats.deny(Op.DISK_WRITE, Denial.QUOTA)
                raise RequestError(
                    f"a write of {length} bytes would exceed the quota of {self.quota_bytes} bytes"
                )
        self._set_headroom(headroom - length)

    def _set_headroom(self, size_bytes: int) -> None:
        """What may be written before the image is measured again, shared evenly by the queues' loops."""
        for ring in self._rings:
            ring.headroom = size_bytes // len(self._rings)

    def _get_id(self, chain: Chain, room: int) -> None:
        if room < ID_BYTES:
            raise RequestError(f"a device id of {ID_BYTES} bytes into {room}")
        chain.write(self._serial)

    def _flush(self) -> None:
        denial = self.gate.check(Op.DISK_FLUSH, 0)
        if denial is not None:
            self.stats.deny(Op.DISK_FLUSH, denial)
            raise RequestError(f"flush refused: {denial.value}")
        try:
            self.store.sync()
        except OSError:
            self.stats.deny(Op.DISK_FLUSH, Denial.IO_ERROR)
            raise
        self.stats.allow(Op.DISK_FLUSH)

    def _format(self, chain: Chain, *, is_discard: bool) -> None:
        """DISCARD and WRITE_ZEROES (5.2.6.2): every segment is checked before the first is touched."""
        if not self.acked_features & (BlkFeature.DISCARD if is_discard else BlkFeature.WRITE_ZEROES):
            raise NotImplementedError
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
                raise NotImplementedError
            if sectors > MAX_SEGMENT_SECTORS:
                self.stats.deny(Op.DISK_FORMAT, Denial.INVALID)
                raise RequestError(
                    f"a segment of {sectors} sectors: at most {MAX_SEGMENT_SECTORS} are allowed"
                )
            self._check_format(sector, sectors)
        for sector, sectors, flags in segments:
            if sectors == 0:
                continue
            offset, size = sector * SECTOR_BYTES, sectors * SECTOR_BYTES
            if is_discard:
                self.store.discard(offset, size)
            else:
                unmap = bool(flags & SEGMENT_FLAG_UNMAP)
                if not unmap:
                    self._check_quota(offset, size)
                self.store.write_zeroes(offset, size, unmap=unmap)
            if self.quota_bytes is not None:
                self._set_headroom(0)
            self.stats.allow(Op.DISK_FORMAT, size)

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
            "quota": {"storage_bytes": self.store.allocated_bytes, "limit_bytes": self.quota_bytes},
        }

    def close(self) -> None:
        self.store.close()

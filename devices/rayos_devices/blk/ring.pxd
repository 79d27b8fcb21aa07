# C types of ring.py.
cimport cython
from rayos_devices.blk.flight cimport Flight, DiskRequest
from rayos_devices.bucket cimport Limiter
from rayos_devices.gate cimport Gate
from rayos_devices.native cimport Buffers, now_ns
from rayos_devices.stats cimport Stats
from rayos_devices.virtio.memory cimport Region
from rayos_devices.virtio.vring cimport Vring

cdef int RWF_NOWAIT, SECTOR_SHIFT, SECTOR_MASK, HEADER_BYTES, TYPE_IN, TYPE_OUT, STATUS_OK, STATUS_IOERR, OVER, READ, WRITE
cdef int NOTHING, SPENT, IDLE, WAIT, CROWDED, FRAME_BYTES, PUBLISH_EVERY, READ_OP, WRITE_OP, MISS_STREAK, RETRY_MASK, EAGAIN, EINTR, EOPNOTSUPP, LATER
cdef int POLL_SHARE_SHIFT
cdef long long SLOW_NS, SLOW_PAUSE_NS, POLL_SAVED_NS, LINGER_NS

cdef class BlkRing:
    cdef readonly Vring vring
    cdef readonly Flight flight
    cdef readonly Limiter limiter
    cdef readonly int fd
    cdef public unsigned long long size_bytes, max_bytes
    cdef public bint is_watched, read_only, is_direct, is_durable
    cdef public long long headroom
    cdef public unsigned long long poll_ns, linger_ns
    cdef public int publish_every
    cdef readonly Stats stats
    cdef readonly Gate gate
    cdef readonly Buffers buffers
    cdef readonly int served
    cdef readonly unsigned int kind
    cdef readonly unsigned long long sector, offset
    cdef unsigned char[::1] _header
    cdef bint _can_peek, _is_sampled
    cdef unsigned int _misses
    cdef unsigned long long _slow_until, _poll_stamp, _clock, _started, _gated, _passed
    cdef long long _poll_credit

    @cython.locals(vring=Vring, flight=Flight, head=cython.int, size=cython.ulonglong)
    cpdef int run(self, int budget) except? -9
    cdef bint _is_full(self) except -1
    cdef bint _must_wait(self) noexcept
    @cython.locals(start=cython.ulonglong, wait=cython.longlong)
    cdef bint _poll(self) except *
    @cython.locals(vring=Vring, count=cython.uint, split=cython.uint, length=cython.ulonglong, is_whole=cython.bint,
                   operation=cython.int)
    cdef bint _serve(self, unsigned int head) except *
    @cython.locals(vring=Vring, length=cython.longlong, done=cython.longlong,
                   last=cython.uint, region=Region, at=cython.ulonglong, operation=cython.int, request=DiskRequest,
                   spare=Buffers)
    cpdef perform(self, unsigned int head)
    @cython.locals(done=cython.longlong)
    cdef long long _read_now(self) noexcept
    @cython.locals(done=cython.longlong, started=cython.ulonglong)
    cdef long long _write_now(self) noexcept
    cpdef void pass_quota(self) noexcept
    cdef void _sample(self, int operation, unsigned long long length) noexcept
    @cython.locals(flight=Flight, request=DiskRequest)
    cpdef complete(self, unsigned int head, unsigned int written)
    @cython.locals(vring=Vring, last=cython.uint, request=DiskRequest)
    cpdef DiskRequest claim(self, unsigned int head, int kind)
    @cython.locals(vring=Vring, region=Region, at=cython.ulonglong, end=cython.ulonglong, done=cython.uint,
                   index=cython.uint)
    cdef void _read_header(self) noexcept
    @cython.locals(vring=Vring, index=cython.uint, start=cython.ulonglong, length=cython.ulonglong, region=Region)
    cdef bint _collect(self, unsigned int first, unsigned int end, unsigned long long skip,
                       unsigned long long limit) noexcept

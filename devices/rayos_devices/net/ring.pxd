# C types of ring.py.
cimport cython
from rayos_devices.bucket cimport TokenBucket
from rayos_devices.gate cimport Gate
from rayos_devices.native cimport Buffers, now_ns, swap
from rayos_devices.net.capture cimport Capture
from rayos_devices.net.filter cimport Filter
from rayos_devices.net.path cimport Path
from rayos_devices.net.queue cimport Inlet
from rayos_devices.stats cimport Stats
from rayos_devices.virtio.memory cimport Region
from rayos_devices.virtio.vring cimport Vring

cdef int ALLOW, PUBLISH_EVERY, TX_OP, RX_OP, EMPTY, DRY, QUIET, WAIT, FAILED, SPENT
cdef unsigned int GAP_BYTES, LEGACY_HEADER_BYTES
cdef unsigned long long MIN_BYTES, MAX_BYTES, HEADER_BYTES, NUM_BUFFERS_OFFSET, WHOLE_BYTES, HEAD_BYTES

@cython.final
cdef class NetRing:
    cdef readonly Vring vring
    cdef public Path path
    cdef readonly Stats stats
    cdef const unsigned long long[::1] _mask
    cdef readonly TokenBucket bucket
    cdef readonly bint is_shaped
    cdef readonly Filter filter
    cdef readonly bint is_filtered
    cdef readonly unsigned long long spill
    cdef readonly Buffers buffers
    cdef public unsigned int gap
    cdef unsigned char[::1] _gap_room
    cdef unsigned long long _gap_address
    cdef Capture capture
    cdef bint is_captured
    cdef readonly int served
    cdef readonly unsigned long long size, inside
    cdef public int publish_every
    cdef unsigned long long _clock, _shaped, _received, _gated, _filtered
    cdef unsigned int _turn, _accepted
    cdef bint _is_sampled

    cpdef shape(self, bucket)
    cpdef watch(self, capture)
    @cython.locals(vring=Vring, index=cython.uint)
    cdef _drop(self, denial, unsigned long long size)
    cdef bint _insert_gap(self) noexcept
    @cython.locals(vring=Vring, head=cython.int)
    cpdef int transmit(self, int budget) except? -9
    @cython.locals(vring=Vring, head=cython.int)
    cdef int _next(self) except? -9
    cdef bint _must_wait(self) noexcept
    @cython.locals(vring=Vring, size=cython.ulonglong, index=cython.uint)
    cdef bint _send(self) except -1
    cpdef bint forward(self, unsigned long long size) except -1
    cdef _refuse(self, int operation, unsigned long long size)
    cdef void _count(self, int operation, unsigned long long size) noexcept
    @cython.locals(now=cython.ulonglong, received=cython.ulonglong)
    cdef void _sample(self, int operation, unsigned long long size) noexcept
    @cython.locals(vring=Vring, head=cython.int, size=cython.longlong)
    cpdef int receive(self, int budget) except? -9
    cdef void _collect(self) noexcept
    @cython.locals(vring=Vring, first=cython.uint, index=cython.uint)
    cdef void _open(self) noexcept
    cdef bint _admit(self, unsigned long long size) except -1
    @cython.locals(vring=Vring, first=cython.uint)
    cdef bint _deliver(self, unsigned int head, unsigned long long size) except -1
    @cython.locals(vring=Vring, first=cython.uint, region=Region, at=cython.ulonglong)
    cdef void _complete(self, unsigned int head, unsigned long long size) noexcept
    @cython.locals(vring=Vring, size=cython.ulonglong, head=cython.int, first=cython.uint)
    cpdef bint accept(self, Buffers buffers, bint is_echo) except -1
    @cython.locals(inside=cython.ulonglong, verdict=cython.int)
    cdef bint _pour(self, Buffers buffers, unsigned long long size, bint is_echo) except -1
    cpdef void flush(self) noexcept
    cpdef received(self, unsigned long long size)

cdef class RingInlet(Inlet):
    cdef NetRing ring

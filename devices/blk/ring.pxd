# C types of ring.py.
cimport cython
from devices.gate cimport Gate
from devices.native cimport Buffers, now_ns
from devices.stats cimport Stats
from devices.virtio.memory cimport Region
from devices.virtio.vring cimport Vring

cdef int RWF_NOWAIT, SECTOR_SHIFT, SECTOR_MASK, HEADER_BYTES, TYPE_IN, TYPE_OUT, STATUS_OK
cdef int NOTHING, SPENT, PUBLISH_EVERY, READ_OP, WRITE_OP

cdef class BlkRing:
    cdef readonly Vring vring
    cdef readonly int fd
    cdef public unsigned long long size_bytes, max_bytes
    cdef public int read_flags
    cdef public bint read_only
    cdef public long long headroom
    cdef readonly Stats stats
    cdef readonly Gate gate
    cdef readonly Buffers buffers
    cdef readonly int served

    @cython.locals(vring=Vring, head=cython.int)
    cpdef int drain(self, int budget) except? -3
    @cython.locals(vring=Vring, count=cython.uint, split=cython.uint, region=Region, at=cython.ulonglong,
                   kind=cython.uint, sector=cython.ulonglong, started=cython.ulonglong, skip=cython.int,
                   operation=cython.int, length=cython.ulonglong, offset=cython.ulonglong, done=cython.longlong,
                   last=cython.uint)
    cdef bint _serve(self) noexcept
    @cython.locals(vring=Vring, index=cython.uint, start=cython.ulonglong, length=cython.ulonglong, region=Region)
    cdef bint _collect(self, unsigned int first, unsigned int end, unsigned long long limit) noexcept

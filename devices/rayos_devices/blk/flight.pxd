# C types of flight.py.
cimport cython
from rayos_devices.bucket cimport Limiter
from rayos_devices.native cimport Buffers, now_ns
from rayos_devices.stats cimport Stats
from rayos_devices.uring cimport Uring
from rayos_devices.virtio.memory cimport Region
from rayos_devices.virtio.vring cimport Vring

cdef int READ, WRITE, SYNC, FORMAT, OVER, RWF_DSYNC, STATUS_OK, STATUS_IOERR, SLOT_MASK, SLOT_BITS, MAX_FORMATS
cdef int OP_READV, OP_WRITEV, OP_FSYNC, OP_FALLOCATE, FSYNC_DATASYNC, MAX_QUEUE_SIZE

cdef class DiskRequest:
    cdef readonly Buffers buffers
    cdef public int kind, error
    cdef public unsigned int head, written, waiting
    cdef public unsigned long long offset, length, growth, started, gated, passed, status_at
    cdef public Region region
    cdef public object segments
    cdef public bint is_durable, is_syncing
    cpdef void forget(self) noexcept

cdef class Flight:
    cdef readonly Vring vring
    cdef readonly Limiter limiter
    cdef readonly object store
    cdef readonly int fd
    cdef readonly Stats stats
    cdef readonly Uring uring
    cdef readonly bint is_async
    cdef readonly list requests
    cdef list _pool
    cdef unsigned long long _first, _next
    cdef readonly unsigned int in_flight
    cdef readonly unsigned long long growth

    cpdef DiskRequest claim(self)
    cpdef release(self, DiskRequest request)
    @cython.locals(slot=cython.uint)
    cpdef add(self, DiskRequest request)
    @cython.locals(uring=Uring, operation=cython.int, done=cython.ulonglong, flags=cython.int)
    cdef _start(self, unsigned int slot, DiskRequest request)
    @cython.locals(done=cython.ulonglong, result=cython.longlong, flags=cython.int)
    cdef _transfer(self, DiskRequest request)
    cdef _went_on(self, DiskRequest request, long long result)
    cdef _format(self, unsigned int slot, DiskRequest request)
    cdef _sync(self, unsigned int slot, DiskRequest request)
    cpdef submit(self)
    @cython.locals(uring=Uring)
    cpdef reap(self)
    @cython.locals(slot=cython.uint, request=DiskRequest)
    cdef _came_back(self, unsigned long long user_data, long long result)
    cdef _failed(self, DiskRequest request, unsigned int segment, long long result)
    @cython.locals(slot=cython.uint, request=DiskRequest)
    cdef _retire(self)
    @cython.locals(is_promise=cython.bint)
    @cython.locals(now=cython.ulonglong, taken=cython.ulonglong, index=cython.int)
    cdef _end(self, DiskRequest request)
    cpdef drain(self)

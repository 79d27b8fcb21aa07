# C types of capture.py.
cimport cython
from rayos_devices.native cimport Buffers, now_ns
from rayos_devices.net.path cimport Path

cdef unsigned long long HEADER_BYTES, RECORD_BYTES, ROOM_BYTES
cdef int INBOUND, OUTBOUND, DENIED

@cython.final
cdef class Capture:
    cdef unsigned long long _snap, _address, _start, _end
    cdef object _on_record, _room
    cdef unsigned long long[::1] _words
    cdef bint _is_asked
    cdef long long _last
    cdef readonly unsigned long long seen, dropped

    @cython.locals(original=cython.ulonglong, kept=cython.ulonglong, word=cython.ulonglong)
    cpdef take_denied(self, Buffers buffers, unsigned long long size)
    cpdef deny_last(self)
    cpdef take(self, Buffers buffers, unsigned long long size, unsigned int direction)

cdef class CapturePath(Path):
    cdef readonly Path inner
    cdef readonly Capture capture
    @cython.locals(size=cython.ulonglong, result=cython.longlong)
    cpdef long long send(self, Buffers buffers) except? -9999
    @cython.locals(size=cython.longlong)
    cpdef long long receive(self, Buffers buffers) except? -9999
    cpdef bint has_frame(self) noexcept
    cpdef void set_awake(self, bint awake) noexcept

# C types of queue.py.
cimport cython
from rayos_devices.native cimport Buffers, signal, swap, take_signal

cdef unsigned int LIMIT, LIMIT_MASK, HEADER_BYTES, ADDRESS_BYTES
cdef unsigned long long ROOM_BYTES

cdef class Inlet:
    cpdef bint accept(self, Buffers buffers, bint is_echo) except -1
    cpdef void flush(self) noexcept

@cython.final
cdef class FrameQueue:
    cdef readonly int fd
    cdef unsigned long long _address
    cdef object _room
    cdef unsigned long long[::1] _starts
    cdef unsigned long long[::1] _sizes
    cdef unsigned int _first, _count
    cdef unsigned long long _end
    cdef bint _is_told, _is_awake, _is_echo, _has_inlet
    cdef Inlet _inlet
    cdef readonly unsigned long long lost

    @cython.locals(size=cython.ulonglong, start=cython.ulonglong, slot=cython.uint)
    cpdef int push(self, Buffers buffers) except -1
    @cython.locals(slot=cython.uint)
    cdef bint _is_in_the_way(self, unsigned long long start, unsigned long long size) noexcept
    cdef void _drop(self) noexcept
    cpdef void flush(self) noexcept
    @cython.locals(slot=cython.uint, size=cython.ulonglong)
    cpdef long long pop(self, Buffers buffers) noexcept
    cpdef bint has_frame(self) noexcept
    cpdef void set_awake(self, bint awake) noexcept

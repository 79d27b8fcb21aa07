# C types of queue.py.
cimport cython
from devices.native cimport Buffers, copy, signal, take_signal

cdef unsigned int LIMIT, LIMIT_MASK, HEADER_BYTES, ADDRESS_BYTES
cdef unsigned long long ROOM_BYTES

@cython.final
cdef class FrameQueue:
    cdef readonly int fd
    cdef unsigned long long _address
    cdef object _room
    cdef unsigned long long[::1] _starts
    cdef unsigned long long[::1] _sizes
    cdef unsigned int _first, _count
    cdef unsigned long long _end
    cdef bint _is_told, _is_awake
    cdef readonly unsigned long long lost

    @cython.locals(size=cython.ulonglong, start=cython.ulonglong, slot=cython.uint)
    cpdef long long push(self, Buffers buffers) noexcept
    @cython.locals(slot=cython.uint)
    cdef bint _is_in_the_way(self, unsigned long long start, unsigned long long size) noexcept
    cdef void _drop(self) noexcept
    @cython.locals(slot=cython.uint, at=cython.ulonglong, spare=cython.ulonglong)
    cpdef void swap_addresses(self) noexcept
    @cython.locals(slot=cython.uint, size=cython.ulonglong)
    cpdef long long pop(self, Buffers buffers) noexcept
    cpdef bint has_frame(self) noexcept
    cpdef void set_awake(self, bint awake) noexcept

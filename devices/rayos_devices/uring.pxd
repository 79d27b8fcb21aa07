# C types of uring.py.
cimport cython
from rayos_devices.native cimport enter, fence

cdef int SQE_WORDS, ENTER_GETEVENTS

cdef class Uring:
    cdef readonly int fd
    cdef readonly unsigned int entries
    cdef readonly unsigned int in_flight
    cdef readonly unsigned long long user_data
    cdef readonly int result
    cdef volatile unsigned int[::1] _words
    cdef volatile unsigned long long[::1] _wide
    cdef volatile unsigned long long[::1] _sqes
    cdef unsigned int _sq_head, _sq_tail, _cq_head, _cq_tail, _sq_mask, _cq_mask, _cqes, _tail, _head, _prepared

    @cython.locals(at=cython.uint)
    cpdef prepare(self, unsigned int operation, unsigned long long fd, unsigned long long offset,
                  unsigned long long address, unsigned long long length, unsigned long long flags,
                  unsigned long long user_data)
    cpdef submit(self)
    cpdef wait(self)
    @cython.locals(done=cython.int)
    cdef _enter(self, unsigned int minimum)
    @cython.locals(at=cython.uint, result=cython.longlong)
    cpdef bint reap(self) noexcept

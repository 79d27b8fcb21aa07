# C types of bucket.py.
cimport cython

@cython.final
cdef class TokenBucket:
    cdef public double rate, burst
    cdef double _level
    cdef readonly double _stamp
    cpdef double wait(self, double now) noexcept
    cpdef void take(self, double units) noexcept

cdef class Limiter:
    cdef readonly bint is_on
    cdef readonly double operations_per_second, bytes_per_second
    cdef readonly unsigned int at_once
    cdef public unsigned int busy
    cdef public unsigned long long waits
    cdef TokenBucket _operations
    cdef TokenBucket _bytes
    cpdef bint is_full(self) noexcept
    @cython.locals(seconds=cython.double)
    cpdef double wait(self, double now) noexcept
    cpdef void take(self, double size) noexcept

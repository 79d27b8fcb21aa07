# C types of bucket.py.
cimport cython

cdef class TokenBucket:
    cdef public double rate, burst
    cdef double _level
    cdef readonly double _stamp
    cpdef double wait(self, double now) noexcept
    cpdef void take(self, double units) noexcept

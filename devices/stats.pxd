# C types of stats.py.
cimport cython

cdef int _BUCKETS, _WORDS

@cython.final
cdef class Stats:
    cdef readonly tuple ops
    cdef readonly unsigned long long[::1] words
    @cython.locals(base=cython.int)
    cpdef void count(self, int index, unsigned long long size_bytes) noexcept
    @cython.locals(bucket=cython.int)
    cpdef void sample(self, int index, unsigned long long nanoseconds) noexcept

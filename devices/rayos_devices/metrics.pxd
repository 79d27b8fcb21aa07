# C types of metrics.py.
cimport cython
from rayos_devices.native cimport fence

cdef unsigned long long _MASK
cdef int _WORDS

@cython.final
cdef class MetricsRing:
    cdef readonly unsigned long long[::1] words
    @cython.locals(words=cython.ulonglong[::1], number=cython.ulonglong, base=cython.ulonglong)
    cpdef void write(self, unsigned long long at_ns, unsigned long long operations, unsigned long long size_bytes,
                     unsigned long long denials, unsigned long long cpu_ns, unsigned long long depth) noexcept

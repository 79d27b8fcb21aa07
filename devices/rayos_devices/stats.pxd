# C types of stats.py.
cimport cython
from rayos_devices.native cimport fence, now_ns

cdef int _BUCKETS, _WORDS, _COUNTERS, _DENIALS, _NEXT, _SLOTS, _SLOT, _PROFILES, _PROFILE, _DONE
cdef unsigned long long _KEPT_MASK, _PROFILED_MASK, _U32

cdef unsigned long long _bounded(unsigned long long nanoseconds) noexcept

@cython.final
cdef class Stats:
    cdef readonly tuple ops
    cdef readonly unsigned long long[::1] words
    cdef public unsigned int sample_mask
    @cython.locals(base=cython.int)
    cpdef void count(self, int index, unsigned long long size_bytes) noexcept
    @cython.locals(bucket=cython.int, left=cython.ulonglong)
    cpdef void sample(self, int index, unsigned long long nanoseconds, unsigned long long size_bytes,
                      unsigned long long now) noexcept
    @cython.locals(words=cython.ulonglong[::1], number=cython.ulonglong, base=cython.ulonglong)
    cdef void _keep(self, unsigned long long kind, unsigned long long now, unsigned long long size_bytes,
                    unsigned long long nanoseconds) noexcept
    @cython.locals(words=cython.ulonglong[::1], base=cython.ulonglong, count=cython.ulonglong, at=cython.ulonglong)
    cpdef void profile(self, int index, unsigned long long capability, unsigned long long quota,
                       unsigned long long firewall, unsigned long long perform) noexcept

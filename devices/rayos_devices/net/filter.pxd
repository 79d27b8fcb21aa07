# C types of filter.py.
cimport cython
from rayos_devices.native cimport Buffers

cdef unsigned long long ALLOW, DENY, MALFORMED, ACTION_MASK, HOLDS, SLOT_SHIFT, SLOT_MASK, SET_MASK, _WAYS, WORDS, _HOLD
cdef unsigned long long WHOLE_BYTES, HEAD_BYTES, HEADER_BYTES, _U64
cdef unsigned long long _MIX0, _MIX1, _MIX2, _MIX3, _KIND4, _KIND6
cdef int _NEEDS_CSUM, _GSO_TCP4, _GSO_TCP6, _GSO_ECN

@cython.final
cdef class Filter:
    cdef readonly object judge, room
    cdef readonly bint is_outgoing
    cdef public bint is_remembering
    cdef readonly bint is_malformed
    cdef readonly unsigned long long address
    cdef readonly unsigned long long remembered, asked, offload
    cdef unsigned char[::1] _bytes
    cdef unsigned short[::1] _halves
    cdef unsigned int[::1] _quads
    cdef unsigned long long[::1] _entries
    cdef volatile unsigned long long[::1] _epoch
    cdef const unsigned long long[::1] _page
    cdef unsigned long long[::1] _hits
    cdef unsigned int _mac0, _mac1, _mac2
    cdef unsigned long long _seed, _last, _kind, _from_low, _from_high, _to_low, _to_high

    @cython.locals(head=cython.ulonglong, verdict=cython.int)
    cpdef int check(self, Buffers buffers, unsigned long long size, unsigned long long now_ns) except -1
    @cython.locals(verdict=cython.int)
    cpdef int decide(self, unsigned long long size, unsigned long long now_ns) except -1
    @cython.locals(transport=cython.int, at=cython.ulonglong, _=cython.int, verdict=cython.ulonglong)
    cdef int recall(self, unsigned long long size, unsigned long long now_ns) noexcept
    cdef bint _is_at(self, unsigned long long at) noexcept
    @cython.locals(mixed=cython.ulonglong)
    cdef unsigned long long _find(self) noexcept
    @cython.locals(stamp=cython.ulonglong, verdict=cython.ulonglong)
    cdef int ask(self, unsigned long long size, unsigned long long now_ns) except -1
    @cython.locals(first=cython.ulonglong, place=cython.ulonglong, oldest=cython.ulonglong, at=cython.ulonglong,
                   age=cython.ulonglong, way=cython.ulonglong)
    cdef void _keep(self, unsigned long long stamp, unsigned long long now_ns, unsigned long long verdict) noexcept
    @cython.locals(room=cython.longlong, ethertype=cython.uint, length=cython.int, protocol=cython.ulonglong, header=cython.int,
                   ports=cython.ulonglong, low=cython.uint, high=cython.uint)
    cdef int _plain(self, unsigned long long size) noexcept
    @cython.locals(high=cython.ulonglong)
    cdef unsigned long long _pair(self, unsigned int index) noexcept
    cdef bint _is_between_us(self) noexcept
    @cython.locals(kind=cython.int, protocol=cython.uint, where=cython.uint)
    cdef bint _is_sound_offload(self, int transport) noexcept

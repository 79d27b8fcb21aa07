# C types of memory.py.
cimport cython

@cython.final
cdef class Region:
    cdef readonly object spec
    cdef readonly object view
    cdef volatile unsigned char[::1] ram
    cdef volatile unsigned short[::1] ram16
    cdef volatile unsigned int[::1] ram32
    cdef volatile unsigned long long[::1] ram64
    cdef readonly unsigned long long size
    cdef readonly unsigned long long address
    cdef readonly unsigned long long guest_address
    cdef readonly unsigned long long guest_end
    cdef readonly unsigned long long user_address
    cdef readonly unsigned long long user_end

@cython.final
cdef class GuestMemory:
    cdef readonly bint must_be_sealed
    cdef readonly list regions
    cdef Region _last
    @cython.locals(region=Region, candidate=Region)
    cpdef Region find(self, unsigned long long guest_address, unsigned long long length)
    @cython.locals(region=Region)
    cpdef Region copy(self, unsigned long long guest_address, unsigned long long length)

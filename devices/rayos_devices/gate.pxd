# C types of gate.py. A device's page is mapped for reading only, so the view of it is const.
cimport cython

@cython.final
cdef class Gate:
    cdef readonly const unsigned long long[::1] mask
    cpdef bint allows(self, int index) noexcept

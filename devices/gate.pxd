# C types of gate.py.
cdef class Gate:
    cdef readonly unsigned long long[::1] mask
    cpdef bint allows(self, int index) noexcept

cdef extern from *:
    void __sync_synchronize() noexcept nogil

cdef extern from *:
    void fence "__sync_synchronize"() noexcept nogil

# C types of path.py.
cimport cython
from devices.native cimport Buffers
from devices.net.queue cimport FrameQueue

cdef int EMPTY, HEADER_BYTES, ETHERNET_HEADER_BYTES

cdef class Path:
    cpdef long long send(self, Buffers buffers) except? -9999
    cpdef long long receive(self, Buffers buffers) except? -9999
    cpdef bint has_frame(self) noexcept
    cpdef void set_awake(self, bint awake) noexcept

cdef class FilePath(Path):
    cdef readonly int fd

cdef class QueuePath(Path):
    cdef readonly FrameQueue outgoing, incoming
    cdef bint is_echo

cdef class ViewPath(Path):
    cdef readonly object port

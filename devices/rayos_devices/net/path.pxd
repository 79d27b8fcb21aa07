# C types of path.py.
cimport cython
from rayos_devices.native cimport Buffers
from rayos_devices.net.queue cimport FrameQueue

cdef int EMPTY

cdef class Path:
    cpdef long long send(self, Buffers buffers) except? -9999
    cpdef long long receive(self, Buffers buffers) except? -9999
    cpdef void flush(self) noexcept
    cpdef bint has_frame(self) noexcept
    cpdef void set_awake(self, bint awake) noexcept

cdef class FilePath(Path):
    cdef readonly int fd

cdef class QueuePath(Path):
    cdef readonly FrameQueue outgoing, incoming

cdef class ViewPath(Path):
    cdef readonly object port

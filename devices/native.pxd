# C types of native.py. The one extern of our own is the fence; the rest is the C library.
cimport cython
from posix.types cimport off_t
from posix.time cimport clock_gettime, timespec, CLOCK_MONOTONIC
from libc.errno cimport errno as c_errno

cdef extern from *:
    void __sync_synchronize() noexcept nogil

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv2(int fd, const iovec *vectors, int count, off_t offset, int flags)
    ssize_t pwritev2(int fd, const iovec *vectors, int count, off_t offset, int flags)
    ssize_t readv(int fd, const iovec *vectors, int count)
    ssize_t writev(int fd, const iovec *vectors, int count)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, unsigned long long value)

cdef int MAX_BUFFERS
cdef timespec _time

cpdef void fence() noexcept
cpdef unsigned long long now_ns() noexcept
cpdef void signal(int fd) noexcept

cdef class Buffers:
    cdef readonly int count
    cdef readonly unsigned long long total
    cdef public list views
    cdef iovec[160] vectors
    cpdef void clear(self) noexcept
    cpdef bint add(self, volatile unsigned char[::1] ram, unsigned long long start, unsigned long long length) noexcept
    @cython.locals(done=ssize_t)
    cpdef ssize_t read(self, int fd, unsigned long long offset, int flags) noexcept
    @cython.locals(done=ssize_t)
    cpdef ssize_t write(self, int fd, unsigned long long offset, int flags) noexcept
    @cython.locals(done=ssize_t)
    cpdef ssize_t receive(self, int fd) noexcept
    @cython.locals(done=ssize_t)
    cpdef ssize_t send(self, int fd) noexcept

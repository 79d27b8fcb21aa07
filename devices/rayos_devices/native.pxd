# C types of native.py. The externs of our own are the fences; the rest is the C library.
cimport cython
from posix.types cimport off_t
from posix.time cimport clock_gettime, timespec, CLOCK_MONOTONIC
from libc.errno cimport errno as c_errno
from libc.string cimport memmove

cdef extern from *:
    void __sync_synchronize() noexcept nogil
    void __atomic_thread_fence(int model) noexcept nogil
    int __ATOMIC_ACQ_REL

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

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
    int eventfd_read(int fd, unsigned long long *value)

cdef int MAX_BUFFERS, _SYS_IO_URING_ENTER
cdef timespec _time
cdef unsigned long long _count

cpdef void fence() noexcept
cpdef void order() noexcept
cpdef unsigned long long now_ns() noexcept
cpdef void signal(int fd) noexcept
cpdef bint take_signal(int fd) noexcept
@cython.locals(result=long)
cpdef int enter(int fd, unsigned int to_submit, unsigned int min_complete, unsigned int flags) noexcept
@cython.locals(words=cython.p_ushort, first=cython.ushort, second=cython.ushort, third=cython.ushort)
cpdef void swap(unsigned long long address) noexcept
cpdef void copy(unsigned long long target, unsigned long long source, unsigned long long size) noexcept

@cython.final
cdef class Buffers:
    cdef readonly unsigned int count
    cdef readonly unsigned long long total
    cdef readonly unsigned long long address
    cdef unsigned long long[::1] _words
    cpdef void clear(self) noexcept
    cpdef bint add(self, unsigned long long address, unsigned long long length) noexcept
    cpdef void set(self, unsigned long long address, unsigned long long length) noexcept
    cpdef tuple at(self, unsigned int index)
    cpdef bint is_full(self) noexcept
    cpdef void drop_last(self) noexcept
    @cython.locals(index=cython.uint, seen=cython.ulonglong)
    cpdef bint is_aligned(self, unsigned long long mask) noexcept
    @cython.locals(first=cython.uint, index=cython.uint)
    cpdef void advance(self, unsigned long long size) noexcept
    cpdef void redirect(self, unsigned long long size, unsigned long long address) noexcept
    @cython.locals(index=cython.uint)
    cpdef bint shadow(self, unsigned long long size, unsigned long long address) noexcept
    @cython.locals(index=cython.uint, at=cython.uint, more=cython.uint)
    cpdef bint insert(self, unsigned long long skip, unsigned long long size, unsigned long long address) noexcept
    @cython.locals(done=ssize_t)
    cpdef ssize_t read(self, int fd, unsigned long long offset, int flags) noexcept
    @cython.locals(done=ssize_t)
    cpdef ssize_t write(self, int fd, unsigned long long offset, int flags) noexcept
    @cython.locals(done=ssize_t)
    cpdef ssize_t receive(self, int fd) noexcept
    @cython.locals(done=ssize_t)
    cpdef ssize_t send(self, int fd) noexcept
    @cython.locals(at=cython.ulonglong, index=cython.uint, length=cython.ulonglong, start=cython.ulonglong,
                   part=cython.ulonglong)
    cpdef void transfer(self, unsigned long long skip, unsigned long long size, Buffers target) noexcept
    cpdef unsigned long long gather(self, unsigned long long skip, unsigned long long size,
                                    unsigned long long target) noexcept
    cpdef unsigned long long scatter(self, unsigned long long skip, unsigned long long size,
                                     unsigned long long source) noexcept
    @cython.locals(done=cython.ulonglong, index=cython.uint, length=cython.ulonglong, address=cython.ulonglong)
    cdef unsigned long long _copy(self, unsigned long long skip, unsigned long long size, unsigned long long other,
                                  bint inward) noexcept

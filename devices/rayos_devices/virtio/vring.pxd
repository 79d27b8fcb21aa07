# C types of vring.py.
cimport cython
from rayos_devices.native cimport fence, signal, take_signal
from rayos_devices.virtio.memory cimport GuestMemory, Region
from rayos_devices.virtio.packed cimport PackedRing

cdef int DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT, AVAIL_F_NO_INTERRUPT
cdef int DESCRIPTOR_BYTES, MAX_QUEUE_SIZE, NOTHING
cdef unsigned long long MAX_CHAIN_BYTES

@cython.final
cdef class Vring:
    cdef readonly int index
    cdef readonly unsigned int size
    cdef readonly bint attached
    cdef public str broken
    cdef public int call_fd
    cdef public int error_fd
    cdef public unsigned long long requests, chain_errors, calls, kicks
    cdef readonly GuestMemory memory
    cdef readonly list regions
    cdef readonly unsigned long long[::1] starts
    cdef readonly unsigned long long[::1] lengths
    cdef readonly unsigned long long[::1] addresses
    cdef readonly unsigned int count, readable_count
    cdef readonly unsigned long long readable_bytes, writable_bytes
    cdef volatile unsigned long long[::1] _desc64
    cdef volatile unsigned int[::1] _desc32
    cdef volatile unsigned short[::1] _desc16
    cdef volatile unsigned short[::1] _avail
    cdef volatile unsigned short[::1] _used
    cdef volatile unsigned int[::1] _used_elements
    cdef unsigned char[::1] _busy
    cdef unsigned int _mask, _last_avail, _avail_shadow, _used_idx, _used_published
    cdef public bint is_polled
    cdef public object journal
    cdef bint _is_packed
    cdef PackedRing _ring
    cdef public int fault_status
    cdef bint _event_idx, _indirect, _notify_on_empty, _signalled, _is_logged
    cdef object _log
    cdef unsigned long long _used_at, _descriptors_at
    cdef dict _written

    @cython.locals(last=cython.uint, shadow=cython.uint, waiting=cython.uint, head=cython.uint, is_sound=cython.bint)
    cpdef int take(self) except -2
    @cython.locals(ring=PackedRing, head=cython.uint, is_sound=cython.bint)
    cdef int _take_packed(self) except -2
    @cython.locals(limit=cython.uint, seen=cython.uint, is_sound=cython.bint)
    cdef bint _walk_packed(self, PackedRing ring) except -1
    cdef void _clear(self) noexcept
    cpdef unpop(self, unsigned int head)
    @cython.locals(index=cython.uint, region=Region)
    cdef _note(self, unsigned int head)
    cdef _log_written(self, unsigned int head)
    cdef _log_used(self)
    @cython.locals(address=cython.ulonglong, length=cython.uint, flags=cython.uint, following=cython.uint,
                   seen=cython.uint, limit=cython.uint, is_sound=cython.bint)
    cdef bint _walk(self, unsigned int head) except -1
    @cython.locals(limit=cython.uint, region=Region, base=cython.ulonglong, at=cython.ulonglong, seen=cython.uint,
                   index=cython.uint, is_sound=cython.bint, has_next=cython.bint)
    cdef bint _walk_indirect(self, unsigned long long address, unsigned int length, unsigned int flags) except -1
    @cython.locals(region=Region, start=cython.ulonglong)
    cdef bint _add(self, unsigned long long address, unsigned int length, unsigned int flags) except -1
    @cython.locals(region=Region, part=cython.ulonglong)
    cdef bint _add_across(self, unsigned long long address, unsigned long long length, unsigned int flags) except -1
    @cython.locals(last=cython.ulonglong, region=Region)
    cdef bint _spoil(self, unsigned long long address, unsigned long long length, unsigned int flags) except -1
    cdef bint _is_dry(self) noexcept
    @cython.locals(position=cython.uint)
    cpdef void push(self, unsigned int head, unsigned int written) noexcept
    @cython.locals(new=cython.uint, old=cython.uint, used_event=cython.uint, notify=cython.bint)
    cpdef void publish(self) noexcept
    cdef void _publish_packed(self) noexcept
    cpdef void call(self) noexcept
    cpdef bint is_waiting(self) noexcept
    cpdef bint take_kick(self, int fd) noexcept
    cpdef bint arm(self) noexcept

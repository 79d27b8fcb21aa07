# C types of packed.py.
cimport cython
from rayos_devices.native cimport fence, order

cdef unsigned int DESC_F_AVAIL, DESC_F_USED, DESC_F_WRITE, EVENT_DESC, EVENT_DISABLE
cdef unsigned long long _LIVE

@cython.final
cdef class PackedRing:
    cdef readonly unsigned int size, slot, room, length, id, flags, completed
    cdef readonly unsigned long long address
    cdef readonly bint is_unused
    cdef volatile unsigned long long[::1] _words
    cdef volatile unsigned int[::1] _driver
    cdef volatile unsigned int[::1] _device
    cdef volatile unsigned long long[::1] _journal
    cdef unsigned short[::1] _ids
    cdef unsigned short[::1] _counts
    cdef unsigned int _wrap, _used, _used_wrap, _before, _notes
    cdef bint _event_idx

    @cython.locals(completed=cython.ulonglong)
    cdef void _mark(self, unsigned long long notes) noexcept
    @cython.locals(available=cython.uint, used=cython.uint)
    cpdef bint peek(self) noexcept
    @cython.locals(at=cython.uint, word=cython.ulonglong)
    cpdef void load(self, unsigned int ahead) noexcept
    cpdef void take(self, unsigned int count) noexcept
    cpdef void untake(self, unsigned int head) noexcept
    @cython.locals(identifier=cython.ulonglong, count=cython.ulonglong)
    cpdef void push(self, unsigned int head, unsigned long long written) noexcept
    @cython.locals(notes=cython.uint)
    cpdef unsigned int publish(self) noexcept
    @cython.locals(index=cython.uint, note=cython.ulonglong, at=cython.uint, flags=cython.ulonglong)
    cdef void _store(self, unsigned int notes, bint is_first) noexcept
    @cython.locals(word=cython.uint, flags=cython.uint, event=cython.uint, new=cython.uint, old=cython.uint)
    cpdef bint wants_call(self) noexcept
    cpdef bint ask_for_kick(self) noexcept

"""The few calls that the compiled data path makes into the C library, and what stands for them when interpreted.

This is the only file that knows both worlds: everything else is ordinary Python with C types given beside it (`.pxd`).
Results are the kernel's: minus errno for a failure.
"""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from contextlib import suppress
from threading import Lock
from time import monotonic_ns

import cython

from rayos_devices.virtio.layout import MAX_BUFFERS

_SYS_IO_URING_ENTER = 426

_lock = Lock()
_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.preadv2, _libc.pwritev2):
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    _call.restype = ctypes.c_ssize_t
for _call in (_libc.readv, _libc.writev):
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    _call.restype = ctypes.c_ssize_t


def fence() -> None:
    """A full memory barrier: between storing an index and reading what the other side stored."""
    if cython.compiled:
        __sync_synchronize()
    else:
        with _lock:
            pass


def order() -> None:
    """Loads before it come before, and stores after it after: nothing on x86, but for the compiler."""
    if cython.compiled:
        __atomic_thread_fence(__ATOMIC_ACQ_REL)


def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds."""
    if cython.compiled:
        clock_gettime(CLOCK_MONOTONIC, cython.address(_time))
        return _time.tv_sec * 1_000_000_000 + _time.tv_nsec
    return monotonic_ns()


def signal(fd: int) -> None:
    """Add one to an eventfd. A full counter means that the other side has a wake-up coming anyway."""
    if fd >= 0:
        if cython.compiled:
            eventfd_write(fd, 1)
        else:
            with suppress(OSError):
                os.eventfd_write(fd, 1)


def take_signal(fd: int) -> bool:
    """Set an eventfd to zero; False when it was."""
    if cython.compiled:
        return eventfd_read(fd, cython.address(_count)) == 0
    try:
        os.read(fd, 8)
    except BlockingIOError:
        return False
    return True


def enter(fd: int, to_submit: int, min_complete: int, flags: int) -> int:
    """io_uring_enter(2)."""
    if cython.compiled:
        result = syscall(_SYS_IO_URING_ENTER, fd, to_submit, min_complete, flags, cython.NULL, 0)
        return -c_errno if result < 0 else result
    return _result(_libc.syscall(_SYS_IO_URING_ENTER, fd, to_submit, min_complete, flags, None, 0))


def _result(value: int) -> int:
    return -(ctypes.get_errno() or errno.EIO) if value < 0 else value


def address_of(view: memoryview | array[int] | bytearray) -> int:
    """Where a writable buffer's first byte lies in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class Buffers:
    """A list of buffers for one vectored read or write: an array of iovec, without an object per buffer."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0
        # address u64, length u64 each
        words = array("Q", bytes(16 * MAX_BUFFERS))
        self.address = address_of(words)
        self._words = memoryview(words)

    def clear(self) -> None:
        self.count = 0
        self.total = 0

    def add(self, address: int, length: int) -> bool:
        """Append `length` bytes at `address`, which the caller has checked; False when there is no room."""
        if self.count >= MAX_BUFFERS:
            return False
        self._words[2 * self.count] = address
        self._words[2 * self.count + 1] = length
        self.count += 1
        self.total += length
        return True

    def set(self, address: int, length: int) -> None:
        """Hold these `length` bytes alone."""
        self._words[0] = address
        self._words[1] = length
        self.count = 1
        self.total = length

    def at(self, index: int) -> tuple[int, int]:
        """Address and length of one of them."""
        return self._words[2 * index], self._words[2 * index + 1]

    def is_full(self) -> bool:
        return self.count >= MAX_BUFFERS

    def drop_last(self) -> None:
        self.count -= 1
        self.total -= self._words[2 * self.count + 1]

    def is_aligned(self, mask: int) -> bool:
        """No address and no length has a bit of `mask`."""
        seen = 0
        for index in range(2 * self.count):
            seen |= self._words[index]
        return not seen & mask

    def advance(self, size: int) -> None:
        """Drop the first `size` bytes, at most all."""
        self.total -= size
        first = 0
        while first < self.count and size >= self._words[2 * first + 1]:
            size -= self._words[2 * first + 1]
            first += 1
        for index in range(first, self.count):
            self._words[2 * (index - first)] = self._words[2 * index] + size
            self._words[2 * (index - first) + 1] = self._words[2 * index + 1] - size
            size = 0
        self.count -= first

    def redirect(self, size: int, address: int) -> None:
        """Copy all `size` bytes to `address`, and let them come from there."""
        if self.count == 1:
            copy(address, self._words[0], size)
        else:
            self._copy(0, size, address, False)
            self.count = 1
            self._words[1] = size
        self._words[0] = address

    def shadow(self, size: int, address: int) -> bool:
        """Let the first `size` bytes, of more, come from `address`; False, and nothing is changed, without room."""
        if self.count >= MAX_BUFFERS and self._words[1] > size:
            return False
        self.advance(size)
        for index in range(self.count, 0, -1):
            self._words[2 * index] = self._words[2 * index - 2]
            self._words[2 * index + 1] = self._words[2 * index - 1]
        self._words[0] = address
        self._words[1] = size
        self.count += 1
        self.total += size
        return True

    def insert(self, skip: int, size: int, address: int) -> bool:
        """Put `size` bytes at `address` between the first `skip` bytes and the rest.

        False, and nothing is changed, when there are fewer bytes than `skip`, or no room.
        """
        if skip > self.total or self.count + 2 > MAX_BUFFERS:
            return False
        index = 0
        while index < self.count and skip >= self._words[2 * index + 1]:
            skip -= self._words[2 * index + 1]
            index += 1
        more = 1 if skip == 0 else 2
        for at in range(self.count, index, -1):
            self._words[2 * (at - 1 + more)] = self._words[2 * (at - 1)]
            self._words[2 * (at - 1 + more) + 1] = self._words[2 * (at - 1) + 1]
        if skip:  # a buffer in two: its end is behind the place of the new one
            self._words[2 * (index + 2)] += skip
            self._words[2 * (index + 2) + 1] -= skip
            self._words[2 * index + 1] = skip
            index += 1
        self._words[2 * index] = address
        self._words[2 * index + 1] = size
        self.count += more
        self.total += size
        return True

    def read(self, fd: int, offset: int, flags: int) -> int:
        """preadv2."""
        if cython.compiled:
            done = preadv2(fd, cython.cast(cython.pointer(iovec), self.address), self.count, offset, flags)
            return -c_errno if done < 0 else done
        return _result(_libc.preadv2(fd, self.address, self.count, offset, flags))

    def write(self, fd: int, offset: int, flags: int) -> int:
        """pwritev2."""
        if cython.compiled:
            done = pwritev2(fd, cython.cast(cython.pointer(iovec), self.address), self.count, offset, flags)
            return -c_errno if done < 0 else done
        return _result(_libc.pwritev2(fd, self.address, self.count, offset, flags))

    def receive(self, fd: int) -> int:
        """readv from a stream or a tap."""
        if cython.compiled:
            done = readv(fd, cython.cast(cython.pointer(iovec), self.address), self.count)
            return -c_errno if done < 0 else done
        return _result(_libc.readv(fd, self.address, self.count))

    def send(self, fd: int) -> int:
        """writev to a stream or a tap."""
        if cython.compiled:
            done = writev(fd, cython.cast(cython.pointer(iovec), self.address), self.count)
            return -c_errno if done < 0 else done
        return _result(_libc.writev(fd, self.address, self.count))

    def transfer(self, skip: int, size: int, target: Buffers) -> None:
        """Copy up to `size` bytes behind the first `skip` to the same place in `target`."""
        at = 0
        for index in range(self.count):
            length = self._words[2 * index + 1]
            if skip < at + length:
                start = skip - at if skip > at else 0
                part = length - start
                if part > size:
                    part = size
                target.scatter(at + start, part, self._words[2 * index] + start)
                size -= part
                if size == 0:
                    break
            at += length

    def gather(self, skip: int, size: int, target: int) -> int:
        """Copy up to `size` bytes out of the buffers, behind the first `skip`, to address `target`; how many."""
        return self._copy(skip, size, target, False)

    def scatter(self, skip: int, size: int, source: int) -> int:
        """Copy up to `size` bytes from address `source` into the buffers behind their first `skip`; how many."""
        return self._copy(skip, size, source, True)

    def _copy(self, skip: int, size: int, other: int, inward: bool) -> int:
        done = 0
        for index in range(self.count):
            length = self._words[2 * index + 1]
            if skip >= length:
                skip -= length
                continue
            address = self._words[2 * index] + skip
            length -= skip
            skip = 0
            if length > size - done:
                length = size - done
            if inward:
                copy(address, other + done, length)
            else:
                copy(other + done, address, length)
            done += length
            if done == size:
                break
        return done


def swap(address: int) -> None:
    """Exchange the six bytes at `address`, which the caller has checked, with the six behind them."""
    if cython.compiled:
        words = cython.cast(cython.p_ushort, address)
        first, second, third = words[0], words[1], words[2]
        words[0], words[1], words[2] = words[3], words[4], words[5]
        words[3], words[4], words[5] = first, second, third
    else:
        pair = ctypes.string_at(address, 12)
        ctypes.memmove(address, pair[6:] + pair[:6], 12)


def copy(target: int, source: int, size: int) -> None:
    """memmove between addresses that the caller has checked."""
    if cython.compiled:
        memmove(cython.cast(cython.p_void, target), cython.cast(cython.p_void, source), size)
    else:
        ctypes.memmove(target, source, size)

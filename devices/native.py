"""The few calls that the compiled rings make into the C library, and what stands for them when interpreted.

This is the only file that knows both worlds: everything else is ordinary Python with C types given beside it (`.pxd`).
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from threading import Lock
from time import monotonic_ns

import cython

#: Buffers one request may have: SEG_MAX of virtio-blk and its header, with room.
MAX_BUFFERS = 160

_lock = Lock()


def fence() -> None:
    """A full memory barrier: between storing an index and reading what the other side stored."""
    if cython.compiled:
        __sync_synchronize()
    else:
        with _lock:
            pass


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


class Buffers:
    """A list of buffers for one vectored read or write, without an object per buffer when compiled."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0
        self.views: list[memoryview] = []

    def clear(self) -> None:
        self.count = 0
        self.total = 0
        if not cython.compiled:
            self.views = []

    def add(self, ram: memoryview, start: int, length: int) -> bool:
        """Append `length` bytes of `ram` from `start`, which the caller has checked; False when there is no room."""
        if self.count >= MAX_BUFFERS:
            return False
        if cython.compiled:
            self.vectors[self.count].iov_base = cython.cast(cython.p_void, cython.address(ram[start]))
            self.vectors[self.count].iov_len = length
        else:
            self.views.append(ram[start : start + length])
        self.count += 1
        self.total += length
        return True

    def read(self, fd: int, offset: int, flags: int) -> int:
        """preadv2: bytes read, or minus errno."""
        if cython.compiled:
            done = preadv2(fd, self.vectors, self.count, offset, flags)
            return -c_errno if done < 0 else done
        try:
            return os.preadv(fd, self.views, offset, flags)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def write(self, fd: int, offset: int, flags: int) -> int:
        """pwritev2: bytes written, or minus errno."""
        if cython.compiled:
            done = pwritev2(fd, self.vectors, self.count, offset, flags)
            return -c_errno if done < 0 else done
        try:
            return os.pwritev(fd, self.views, offset, flags)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def receive(self, fd: int) -> int:
        """readv from a stream or a tap: bytes read, or minus errno."""
        if cython.compiled:
            done = readv(fd, self.vectors, self.count)
            return -c_errno if done < 0 else done
        try:
            return os.readv(fd, self.views)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def send(self, fd: int) -> int:
        """writev to a stream or a tap: bytes written, or minus errno."""
        if cython.compiled:
            done = writev(fd, self.vectors, self.count)
            return -c_errno if done < 0 else done
        try:
            return os.writev(fd, self.views)
        except OSError as error:
            return -(error.errno or errno.EIO)

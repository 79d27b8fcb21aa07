"""An io_uring (io_uring(7)) driven by its three system calls, without a library.

The two rings are shared memory like a virtqueue's, and are used the same way: fill entries, fence, store the tail.
Requests are `prepare`d, handed over by `submit` in one call, and come back by `reap` in whatever order they end.
The descriptor is readable when a completion waits.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from typing import Final

from rayos_devices.native import enter, fence

_SYS_IO_URING_SETUP: Final = 425
_SYS_IO_URING_REGISTER: Final = 427
IORING_OFF_SQES: Final = 0x10000000
SETUP_CQSIZE: Final = 1 << 3
SETUP_R_DISABLED: Final = 1 << 6
SETUP_COOP_TASKRUN: Final = 1 << 8
REGISTER_RESTRICTIONS: Final = 11
REGISTER_ENABLE_RINGS: Final = 12
RESTRICTION_SQE_OP: Final = 1
FEAT_SINGLE_MMAP: Final = 1 << 0
FEAT_NODROP: Final = 1 << 1
FEAT_SUBMIT_STABLE: Final = 1 << 2
ENTER_GETEVENTS: Final = 1

OP_READV: Final = 1
OP_WRITEV: Final = 2
OP_FSYNC: Final = 3
OP_FALLOCATE: Final = 17
FSYNC_DATASYNC: Final = 1

#: What a ring may ever do; a worker that was taken over cannot open or connect anything by it.
OPERATIONS: Final = (OP_READV, OP_WRITEV, OP_FSYNC, OP_FALLOCATE)
#: struct io_uring_restriction: opcode u16, sqe_op u8, 13 reserved.
_RESTRICTION: Final = struct.Struct("<HB13x")

#: sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, resv[3]; then two offset tables.
_PARAMETERS: Final = struct.Struct("<7I12x 6I I4x8x 6I8x8x")
SQE_WORDS: Final = 8


class Uring:
    """`entries` requests can be prepared between two submits. Errors of construction: OSError (no io_uring here)."""

    def __init__(self, entries: int) -> None:
        parameters = bytearray(_PARAMETERS.size)
        fd = _setup(entries, parameters, SETUP_COOP_TASKRUN | SETUP_CQSIZE | SETUP_R_DISABLED)
        fields = _PARAMETERS.unpack(parameters)
        count, cq_count, features = fields[0], fields[1], fields[5]
        sq_head, sq_tail, sq_mask, _, _, _, sq_array = fields[7:14]
        cq_head, cq_tail, cq_mask, _, _, cqes = fields[14:20]
        wanted = FEAT_SINGLE_MMAP | FEAT_NODROP | FEAT_SUBMIT_STABLE
        if features & wanted != wanted:
            os.close(fd)
            raise OSError(errno.ENOSYS, "an io_uring older than Linux 5.5")
        try:
            rings = mmap.mmap(fd, max(sq_array + 4 * count, cqes + 16 * cq_count), mmap.MAP_SHARED)
            entries_map = mmap.mmap(fd, 64 * count, mmap.MAP_SHARED, offset=IORING_OFF_SQES)
        except OSError:
            os.close(fd)
            raise
        try:
            _restrict(fd)
        except OSError:
            os.close(fd)
            raise
        self.fd = fd
        self.entries = count
        size = len(rings) & ~7
        self._words = memoryview(rings)[:size].cast("I")
        self._wide = memoryview(rings)[:size].cast("Q")
        self._sqes = memoryview(entries_map).cast("Q")
        self._sq_head, self._sq_tail = sq_head >> 2, sq_tail >> 2
        self._cq_head, self._cq_tail = cq_head >> 2, cq_tail >> 2
        self._sq_mask = self._words[sq_mask >> 2]
        self._cq_mask = self._words[cq_mask >> 2]
        self._cqes = cqes >> 3
        for index in range(count):
            self._words[(sq_array >> 2) + index] = index
        self._tail = self._words[self._sq_tail]
        self._head = self._words[self._cq_head]
        self._prepared = 0
        #: Requests handed over and not reaped.
        self.in_flight = 0
        #: Of the completion reaped last.
        self.user_data = 0
        self.result = 0

    def prepare(
        self, operation: int, fd: int, offset: int, address: int, length: int, flags: int, user_data: int
    ) -> None:
        """Fill the next entry; the fields are those of io_uring_enter(2), `flags` the operation's own."""
        if self._prepared == self.entries:
            self.submit()
        at = (self._tail & self._sq_mask) * SQE_WORDS
        self._sqes[at] = operation | fd << 32
        self._sqes[at + 1] = offset
        self._sqes[at + 2] = address
        self._sqes[at + 3] = length | flags << 32
        self._sqes[at + 4] = user_data
        self._sqes[at + 5] = 0
        self._sqes[at + 6] = 0
        self._sqes[at + 7] = 0
        self._tail = (self._tail + 1) & 0xFFFFFFFF
        self._prepared += 1

    def submit(self) -> None:
        """Hand over what was prepared."""
        self._enter(0)

    def wait(self) -> None:
        """Hand over what was prepared and wait for a completion."""
        self._enter(1)

    def _enter(self, minimum: int) -> None:
        if self._prepared == 0 and minimum == 0:
            return
        fence()
        self._words[self._sq_tail] = self._tail
        self.in_flight += self._prepared
        while True:
            done = enter(self.fd, self._prepared, minimum, ENTER_GETEVENTS if minimum else 0)
            if done >= 0:
                self._prepared -= done
                if self._prepared == 0:
                    return
            elif done not in (-errno.EINTR, -errno.EAGAIN, -errno.EBUSY):
                raise OSError(-done, os.strerror(-done))

    def reap(self) -> bool:
        """Take the next completion into `user_data` and `result`; False when there is none."""
        if self._words[self._cq_tail] == self._head:
            return False
        fence()
        at = self._cqes + 2 * (self._head & self._cq_mask)
        self.user_data = self._wide[at]
        result = self._wide[at + 1] & 0xFFFFFFFF
        self.result = result - 0x100000000 if result & 0x80000000 else result
        fence()
        self._head = (self._head + 1) & 0xFFFFFFFF
        self._words[self._cq_head] = self._head
        self.in_flight -= 1
        return True

    def close(self) -> None:
        os.close(self.fd)


def _setup(entries: int, parameters: bytearray, flags: int) -> int:
    """io_uring_setup(2), with fewer of the wishes when the kernel is older than some. Errors: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    while True:
        struct.pack_into("<III", parameters, 0, 0, 16 * entries, flags)
        view = (ctypes.c_char * len(parameters)).from_buffer(parameters)
        fd = int(libc.syscall(_SYS_IO_URING_SETUP, entries, ctypes.byref(view)))
        if fd >= 0:
            os.set_inheritable(fd, False)
            return fd
        code = ctypes.get_errno()
        if code != errno.EINVAL or not flags & SETUP_COOP_TASKRUN:
            raise OSError(code, os.strerror(code))
        flags &= ~SETUP_COOP_TASKRUN


def _restrict(fd: int) -> None:
    """Allow OPERATIONS for as long as the ring lives, and start it. Errors: OSError."""
    wanted = b"".join(_RESTRICTION.pack(RESTRICTION_SQE_OP, operation) for operation in OPERATIONS)
    libc = ctypes.CDLL(None, use_errno=True)
    for operation, argument, count in (
        (REGISTER_RESTRICTIONS, wanted, len(OPERATIONS)),
        (REGISTER_ENABLE_RINGS, None, 0),
    ):
        if libc.syscall(_SYS_IO_URING_REGISTER, fd, operation, argument, count) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

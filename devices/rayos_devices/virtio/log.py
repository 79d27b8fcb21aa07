"""Which pages of guest memory the devices wrote: the log of a migration (vhost-user specification, *Migration*).

One bit a page of 4096 bytes, by guest address; the frontend fetches and clears words at any time. A page is marked
after it was written, so a frontend that clears a bit and copies the page too early finds the bit again. There is one
writer of all logs, the worker's thread, so a byte is changed without a lock: at worst a fetched bit is set again.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

from rayos_devices.errors import ProtocolError
from rayos_devices.virtio.memory import F_GET_SEALS, F_SEAL_SHRINK

PAGE_SHIFT: Final = 12
#: A log of 1 TiB of guest memory.
MAX_LOG_BYTES: Final = 1 << (40 - PAGE_SHIFT - 3)


class DirtyLog:
    """Maps `size` bytes at `offset` of `fd`, which stays the caller's.

    Errors: ProtocolError when it is empty, too large, beyond its file, or may shrink under us.
    """

    def __init__(self, fd: int, size: int, offset: int) -> None:
        if not 1 <= size <= MAX_LOG_BYTES:
            raise ProtocolError(f"a log of {size} bytes: 1 to {MAX_LOG_BYTES} are allowed")
        try:
            seals = fcntl.fcntl(fd, F_GET_SEALS)
            end = os.fstat(fd).st_size
        except OSError as error:
            raise ProtocolError(f"the log is no memfd: {error}") from error
        if not seals & F_SEAL_SHRINK:
            raise ProtocolError(f"the log has seals {seals:#x}: F_SEAL_SHRINK is demanded")
        if offset + size > end:
            raise ProtocolError(f"the log ends at {offset + size:#x}, beyond its file of {end:#x} bytes")
        try:
            self._map = memoryview(mmap.mmap(fd, offset + size))[offset:]
        except (OSError, OverflowError, ValueError) as error:
            raise ProtocolError(f"the log of {size} bytes cannot be mapped: {error}") from error

    def mark(self, address: int, length: int) -> None:
        """`length` bytes from guest address `address` were written. What the log has no bit for is not its memory."""
        if length <= 0:
            return
        last = min((address + length - 1) >> PAGE_SHIFT, 8 * len(self._map) - 1)
        for page in range(address >> PAGE_SHIFT, last + 1):
            self._map[page >> 3] |= 1 << (page & 7)

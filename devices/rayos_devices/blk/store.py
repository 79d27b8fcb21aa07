"""A raw image: exact reads and writes, holes, durability, and how much of it is really allocated.

A disk may be longer than its image: what is behind the image's end reads as zeros, and a write there makes the image
longer. So an image need not be a multiple of 512 bytes.

Invariants: a write is answered only when every byte of it was taken (short writes are continued); after one failed
sync nothing may claim durability again, since Linux marks the lost pages clean (`is_failed` latches); an image has one
writer.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from ctypes import CDLL, c_int, c_int64, get_errno, memset
from typing import Final

from rayos_devices.blk.wire import SECTOR_BYTES
from rayos_devices.errors import ConfigurationError, RequestError
from rayos_devices.gate import Denial
from rayos_devices.native import Buffers
from rayos_devices.virtio.chain import gather, scatter

#: linux/falloc.h.
FALLOC_FL_KEEP_SIZE: Final = 0x1
FALLOC_FL_PUNCH_HOLE: Final = 0x2
FALLOC_FL_ZERO_RANGE: Final = 0x10
#: Give the range back to the file system; it reads as zeros.
DISCARD: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
#: Make the range read as zeros and keep it allocated.
ZERO: Final = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE

#: What O_DIRECT may move by way of our own memory at once.
BOUNCE_BYTES: Final = 1 << 20

#: What a write is told when the host has no room for it, or no more for this user or process.
FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: preadv takes at most this many buffers (UIO_MAXIOV).
MAX_BUFFERS: Final = 1024

_libc = CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [c_int, c_int, c_int64, c_int64]
_libc.fallocate.restype = c_int


def _unheard(_why: str) -> None:
    """A hook that nobody set."""


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc.fallocate(fd, mode, offset, length) != 0:
        code = get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _go_direct(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        with mmap.mmap(-1, SECTOR_BYTES) as sector:
            os.preadv(fd, [sector], 0)
    except OSError as error:
        raise ConfigurationError(
            f"the disk image cannot be read past the page cache by {SECTOR_BYTES} bytes: {error}"
        ) from error


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES


def _measure(fd: int) -> int:
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return os.lseek(fd, 0, os.SEEK_END)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    raise ConfigurationError("a disk must be a regular file or a block device")


class RawStore:
    """Wraps an open descriptor, which becomes the store's own.

    `size_bytes` is the disk's, where that is more than the image's; `is_direct` goes past the page cache (O_DIRECT);
    `is_unsafe`: no sync reaches the disk, and a host that loses power loses what was promised. Errors of construction:
    ConfigurationError for a file that is empty, locked by another, or that cannot be read directly by the sector.

    `on_full("quota" or "host")` is called for each write that was refused for want of room.
    """

    def __init__(
        self,
        fd: int,
        *,
        read_only: bool = False,
        is_direct: bool = False,
        is_unsafe: bool = False,
        size_bytes: int = 0,
    ) -> None:
        self.on_full: Callable[[str], object] = _unheard
        image_bytes = _measure(fd)
        if image_bytes == 0:
            raise ConfigurationError("a disk image of 0 bytes: at least 1 is allowed")
        if is_direct and image_bytes % SECTOR_BYTES:
            raise ConfigurationError(
                f"a disk image of {image_bytes} bytes past the page cache: a multiple of {SECTOR_BYTES} is allowed"
            )
        self._image_bytes = image_bytes
        self.size_bytes = _round_up(max(image_bytes, size_bytes))
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError("the disk image is in use by another writer") from None
        if is_direct:
            _go_direct(fd)
        self.fd = fd
        self.read_only = read_only
        self.is_direct = is_direct
        self.is_unsafe = is_unsafe
        self.is_failed = False

    @property
    def allocated_bytes(self) -> int:
        """Storage the image really takes (st_blocks), which is what a quota counts."""
        return os.fstat(self.fd).st_blocks * 512

    def grow(self) -> None:
        """Take up the size that the image has now.

        Errors: RequestError when it is smaller, since the guest may have read beyond it.
        """
        size_bytes = _round_up(_measure(self.fd))
        if size_bytes < self.size_bytes:
            raise RequestError(f"the image has {size_bytes} bytes: at least {self.size_bytes} are allowed")
        self.size_bytes = size_bytes
        self._image_bytes = _measure(self.fd)

    def is_allocated(self, offset: int, length: int) -> bool:
        """Whether the range holds no hole: writing there takes no more storage."""
        try:
            return os.lseek(self.fd, offset, os.SEEK_HOLE) >= offset + length
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return False  # behind the image's end

    def read(self, buffers: list[memoryview], offset: int) -> None:
        """Fill the buffers from `offset`. Errors: OSError; RequestError at an early end of file."""
        if not self.is_direct:
            self._transfer(os.preadv, buffers, offset)
            return
        total, done = sum(map(len, buffers)), 0
        while done < total:
            with mmap.mmap(-1, BOUNCE_BYTES) as room, memoryview(room)[: total - done] as aligned:
                self._transfer(os.preadv, [aligned], offset + done)
                done += scatter(buffers, done, aligned)

    def write(self, buffers: list[memoryview], offset: int) -> None:
        """Write the buffers at `offset`, all of them. Errors: OSError, with an unknown part written."""
        if not self.is_direct:
            self._transfer(os.pwritev, buffers, offset)
            return
        total, done = sum(map(len, buffers)), 0
        while done < total:
            with mmap.mmap(-1, BOUNCE_BYTES) as room, memoryview(room)[: total - done] as aligned:
                aligned[:] = gather(buffers, done, len(aligned))
                self._transfer(os.pwritev, [aligned], offset + done)
                done += len(aligned)

    def _transfer(
        self, operation: Callable[[int, list[memoryview], int], int], buffers: list[memoryview], offset: int
    ) -> None:
        while buffers:
            batch = buffers[:MAX_BUFFERS]
            wanted = sum(map(len, batch))
            done = operation(self.fd, batch, offset)
            if done == wanted:
                buffers = buffers[MAX_BUFFERS:]
                offset += done
                continue
            if done == 0 and operation is os.preadv and self.is_tail(offset):
                for buffer in buffers:
                    buffer[:] = bytes(len(buffer))
                return
            if done == 0:
                raise RequestError(f"the image ends at byte {offset}: it was truncated under us")
            offset += done
            while done >= len(buffers[0]):
                done -= len(buffers[0])
                buffers = buffers[1:]
            buffers = [buffers[0][done:], *buffers[1:]]

    def is_tail(self, offset: int) -> bool:
        """Whether the disk goes on there behind the end that the image had when it was opened."""
        return offset >= self._image_bytes

    def fill_tail(self, buffers: Buffers) -> None:
        """Zeros, for a read that begins behind the image's end."""
        for index in range(buffers.count):
            address, length = buffers.at(index)
            memset(address, 0, length)

    def denial(self, code: int) -> Denial:
        """Returns how a request that failed with this errno is counted, and reports a full host."""
        if code not in FULL:
            return Denial.IO_ERROR
        self.on_full("host")
        return Denial.QUOTA

    def sync(self) -> None:
        """Make every completed write durable. Errors: OSError, and for ever after the first."""
        if self.is_unsafe:
            return
        if self.is_failed:
            raise OSError(errno.EIO, "an earlier sync failed: durability cannot be promised any more")
        try:
            os.fdatasync(self.fd)
        except OSError:
            self.is_failed = True
            raise

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Do it now: DISCARD or ZERO the range. Errors: OSError."""
        try:
            _fallocate(self.fd, mode, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or mode != ZERO:
                raise
            # tmpfs: punch the range out and allocate it again, which reads as zeros just the same.
            _fallocate(self.fd, DISCARD, offset, length)
            _fallocate(self.fd, FALLOC_FL_KEEP_SIZE, offset, length)

    def close(self) -> None:
        os.close(self.fd)

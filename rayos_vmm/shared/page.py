"""A page of memory behind a file in a machine's run directory: written by the service, read by the device worker."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

PAGE_BYTES: Final = mmap.PAGESIZE


def map_page(path: Path, *, is_new: bool) -> mmap.mmap:
    """The page, shared and writable; a new one is zeros. Errors: OSError when there is none (and `is_new` is false), or
    it is not of that size."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags | (os.O_CREAT | os.O_EXCL if is_new else 0), 0o600)
    try:
        if is_new:
            os.ftruncate(fd, PAGE_BYTES)
        elif os.fstat(fd).st_size != PAGE_BYTES:
            raise OSError(f"{path} has {os.fstat(fd).st_size} bytes, not {PAGE_BYTES}")
        return mmap.mmap(fd, PAGE_BYTES)
    finally:
        os.close(fd)

"""Guest RAM as a VMM shares it: a sealed memfd, a mapping of our own, a bump allocator over it.

Invariant: `view` covers exactly the bytes that the region of `spec` shares, so address arithmetic is `address - base`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import Final, Self

from rayos_devices.virtio.memory import RegionSpec

F_ADD_SEALS: Final = 1033
F_SEAL_SHRINK: Final = 0x0002

#: Where the frontend pretends to have mapped guest memory; far from the guest's own addresses, so mixing shows.
USER_BASE: Final = 0x7F00_0000_0000


class GuestRam:
    """`size` bytes of memory at `guest_address`; close it (or use `with`) to give descriptor and mapping back."""

    def __init__(
        self,
        size: int = 4 << 20,
        *,
        guest_address: int = 0x10_0000,
        user_address: int | None = None,
        mmap_offset: int = 0,
        seal: bool = True,
        file: Path | None = None,
    ) -> None:
        """`file`: memory is this file, which is made, and not a memfd; it cannot be sealed."""
        if file is not None:
            self.fd, seal = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), False
        else:
            self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, mmap_offset + size)
        if seal:
            fcntl.fcntl(self.fd, F_ADD_SEALS, F_SEAL_SHRINK)
        if user_address is None:
            user_address = USER_BASE + guest_address
        self.spec = RegionSpec(guest_address, size, user_address, mmap_offset)
        self.base = guest_address
        self.size = size
        self.map = mmap.mmap(self.fd, mmap_offset + size)
        self.view = memoryview(self.map)[mmap_offset:]
        self._next = 0

    def allocate(self, size: int, align: int = 16) -> int:
        """The guest address of `size` fresh bytes. Errors: MemoryError when the region is used up."""
        start = (self.base + self._next + align - 1) // align * align - self.base
        if start + size > self.size:
            raise MemoryError(f"{size} bytes do not fit into {self.size - start} of guest memory")
        self._next = start + size
        return self.base + start

    def rewind(self, address: int) -> None:
        """Free everything allocated at `address` and later."""
        self._next = address - self.base

    def put(self, data: bytes, align: int = 16) -> int:
        """Allocate room for `data`, store it there, return its guest address."""
        address = self.allocate(len(data), align)
        self.write(address, data)
        return address

    def write(self, address: int, data: bytes) -> None:
        start = address - self.base
        self.view[start : start + len(data)] = data

    def read(self, address: int, length: int) -> bytes:
        start = address - self.base
        return bytes(self.view[start : start + length])

    def slice(self, address: int, length: int) -> memoryview:
        """A live view."""
        start = address - self.base
        return self.view[start : start + length]

    def user(self, address: int) -> int:
        """The frontend's user address of a guest address, as SET_VRING_ADDR wants it."""
        return self.spec.user_address + address - self.base

    @property
    def end(self) -> int:
        """The first guest address behind the region."""
        return self.base + self.size

    def close(self) -> None:
        """Errors: BufferError while a test still holds a view: the mapping would stay, and a descriptor with it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.view.release()
            self.map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

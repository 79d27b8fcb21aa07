"""Guest memory: what a frontend shares, as bounds-checked views.

A region is one file mapping with two address spaces over it: guest-physical addresses (in descriptors) and the
frontend's user addresses (in SET_VRING_ADDR). Invariant: a view handed out lies wholly inside one region, so no
length or address of a guest can reach a byte that was not shared. (vhost-user specification, *Memory region
description*.)
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Final

from rayos_devices.errors import ChainError, ProtocolError
from rayos_devices.native import address_of

# Not in the fcntl module before Python 3.12's rename; values of linux/fcntl.h.
F_GET_SEALS: Final = 1034
F_SEAL_SHRINK: Final = 0x0002

#: The most regions one table may hold; QEMU's own limit for vhost-user without memory slots is 8, with them 509.
MAX_REGIONS: Final = 32


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """One entry of SET_MEM_TABLE or ADD_MEM_REG; all four fields are in bytes."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int

    def check(self) -> None:
        """Raise ProtocolError when the region is empty or wraps one of its address spaces."""
        if self.size == 0:
            raise ProtocolError("a memory region of 0 bytes: at least 1 is allowed")
        for name, start in (
            ("guest address", self.guest_address),
            ("user address", self.user_address),
            ("mmap offset", self.mmap_offset),
        ):
            # The end itself must fit 64 bits: so the compiled code can hold it, and nobody's memory ends there.
            if start + self.size >= 1 << 64:
                raise ProtocolError(f"memory region wraps: {name} {start:#x} + {self.size:#x} reaches 2^64")


class Region:
    """A mapped region: `view` covers exactly the shared bytes."""

    def __init__(self, spec: RegionSpec, fd: int, *, must_be_sealed: bool = True) -> None:
        """Map `fd`, which stays the caller's to close.

        Errors: ProtocolError when the file is smaller than the region; and, if it `must_be_sealed`, when it could
        shrink under us (a truncation would kill the worker with SIGBUS).
        """
        spec.check()
        if must_be_sealed:
            _check_seals(fd)
        file_size = os.fstat(fd).st_size
        if spec.mmap_offset + spec.size > file_size:
            raise ProtocolError(
                f"memory region ends at {spec.mmap_offset + spec.size:#x}, beyond its file of {file_size:#x} bytes"
            )
        try:
            mapping = mmap.mmap(
                fd, spec.mmap_offset + spec.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
            )
        except (OSError, OverflowError, ValueError) as error:
            # Read only, sealed against writing, or larger than our address space: the peer's fault, not ours.
            raise ProtocolError(f"memory region of {spec.size:#x} bytes cannot be mapped: {error}") from error
        self.spec = spec
        self.view = memoryview(mapping)[spec.mmap_offset :]
        self.size = spec.size
        # The same bytes for the rings: whole 16-byte units as wider words too.
        whole = self.view[: spec.size & ~15]
        self.ram = self.view
        self.ram16 = whole.cast("H")
        self.ram32 = whole.cast("I")
        self.ram64 = whole.cast("Q")
        # Where the bytes lie in this process, for system calls.
        self.address = address_of(self.view)
        self.guest_address = spec.guest_address
        self.guest_end = spec.guest_address + spec.size
        self.user_address = spec.user_address
        self.user_end = spec.user_address + spec.size


class GuestMemory:
    """The regions of one session. Mappings live as long as a view of them does, never longer than needed.

    Memory that need not be sealed may be cut off under us: its user survives SIGBUS (`vhost_user/lost_memory.py`).
    """

    def __init__(self, *, must_be_sealed: bool = True) -> None:
        self.must_be_sealed = must_be_sealed
        self.regions: list[Region] = []
        self._last: Region | None = None

    def replace(self, specs: list[RegionSpec], fds: list[int]) -> None:
        """Take a whole new table (SET_MEM_TABLE); the old one goes only when the new one is sound."""
        if len(specs) > MAX_REGIONS:
            raise ProtocolError(f"{len(specs)} memory regions: at most {MAX_REGIONS} are allowed")
        if len(specs) != len(fds):
            raise ProtocolError(f"{len(specs)} memory regions came with {len(fds)} descriptors")
        fresh: list[Region] = []
        for spec, fd in zip(specs, fds, strict=True):
            _check_overlap(fresh, spec)
            fresh.append(Region(spec, fd, must_be_sealed=self.must_be_sealed))
        self.regions = fresh
        self._last = None

    def add(self, spec: RegionSpec, fd: int) -> None:
        """ADD_MEM_REG."""
        if len(self.regions) >= MAX_REGIONS:
            raise ProtocolError(f"more than {MAX_REGIONS} memory regions")
        _check_overlap(self.regions, spec)
        self.regions = [*self.regions, Region(spec, fd, must_be_sealed=self.must_be_sealed)]

    def remove(self, spec: RegionSpec) -> None:
        """REM_MEM_REG: the one whose guest address, user address and size match."""
        kept = [
            region
            for region in self.regions
            if (region.guest_address, region.user_address, region.spec.size)
            != (spec.guest_address, spec.user_address, spec.size)
        ]
        if len(kept) == len(self.regions):
            raise ProtocolError(
                f"no memory region at guest address {spec.guest_address:#x} of {spec.size:#x} bytes"
            )
        self.regions = kept
        self._last = None

    def restore(self, regions: list[Region]) -> None:
        """Go back to the regions that there were before a change."""
        self.regions = regions
        self._last = None

    def clear(self) -> None:
        self.regions = []
        self._last = None

    def find(self, guest_address: int, length: int) -> Region | None:
        """The region that holds all `length` bytes at a guest-physical address, or None."""
        region = self._last
        if region is None or not region.guest_address <= guest_address < region.guest_end:
            for candidate in self.regions:
                region = candidate
                if region.guest_address <= guest_address < region.guest_end:
                    self._last = region
                    break
            else:
                return None
        if length > region.guest_end - guest_address:
            return None
        return region

    def copy(self, guest_address: int, length: int) -> Region | None:
        """A private copy of `length` bytes, which may lie in several regions that touch; None when not all are there.

        Only `ram16` to `ram64` of it, for a table that a driver put on an odd address, where a region's own wide words
        do not fit, or across a seam.
        """
        data = bytearray()
        while length:
            region = self.find(guest_address, 1)
            if region is None:
                return None
            part = min(length, region.guest_end - guest_address)
            start = guest_address - region.guest_address
            data += region.view[start : start + part]
            guest_address += part
            length -= part
        words = memoryview(data)
        region = Region.__new__(Region)
        region.ram16 = words.cast("H")
        region.ram32 = words.cast("I")
        region.ram64 = words.cast("Q")
        return region

    def views(self, guest_address: int, length: int) -> list[memoryview]:
        """As `view`, in pieces when the bytes lie in several regions that touch."""
        pieces = []
        while length:
            region = self.find(guest_address, 1)
            if region is None:
                raise ChainError(f"{length} bytes at {guest_address:#x} are not inside guest memory")
            part = min(length, region.guest_end - guest_address)
            pieces.append(self.view(guest_address, part))
            guest_address += part
            length -= part
        return pieces

    def view(self, guest_address: int, length: int) -> memoryview:
        """The `length` bytes at a guest-physical address; ChainError when they are not all inside one region."""
        region = self.find(guest_address, length)
        if region is None:
            raise ChainError(
                f"{length} bytes at {guest_address:#x} are not inside one region of guest memory"
            )
        start = guest_address - region.guest_address
        return region.view[start : start + length]

    def user_view(self, user_address: int, length: int) -> memoryview:
        """The `length` bytes at a frontend's user address (the rings); ProtocolError when outside."""
        for region in self.regions:
            if region.user_address <= user_address and user_address + length <= region.user_end:
                start = user_address - region.user_address
                return region.view[start : start + length]
        raise ProtocolError(
            f"ring of {length} bytes at user address {user_address:#x} is outside guest memory"
        )

    def guest_address(self, user_address: int) -> int:
        """The guest-physical address of a frontend's user address; 0 when it is outside."""
        for region in self.regions:
            if region.user_address <= user_address < region.user_end:
                return region.guest_address + user_address - region.user_address
        return 0


def _check_seals(fd: int) -> None:
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(
            "guest memory is not a sealable memfd: start QEMU with memory-backend-memfd,share=on"
        ) from error
    if not seals & F_SEAL_SHRINK:
        raise ProtocolError(
            f"guest memory has seals {seals:#x}: F_SEAL_SHRINK is demanded (memory-backend-memfd,seal=on)"
        )


def _check_overlap(regions: list[Region], spec: RegionSpec) -> None:
    spec.check()
    for region in regions:
        if spec.guest_address < region.guest_end and region.guest_address < spec.guest_address + spec.size:
            raise ProtocolError(
                f"memory region {spec.guest_address:#x}+{spec.size:#x} overlaps "
                f"{region.guest_address:#x}+{region.spec.size:#x}"
            )

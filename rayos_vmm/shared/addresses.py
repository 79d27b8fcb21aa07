"""The addresses that a guest has leased, as its device worker sees them: one page, written by the service.

It says so before the guest is told of its lease, it holds for a worker's successor, and the next service finds it. Two
slots alternate: the first word's lowest bit names the one that holds, so a reader never sees half of a change and a
writer that is killed changes nothing. The first word also ends what was remembered of earlier verdicts.

Layout, u64 each: version; then two slots of a count and MAXIMUM IPv4 addresses.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from rayos_vmm.shared.page import PAGE_BYTES, map_page

PAGE_NAME: Final = "addresses"
#: Addresses of one guest.
MAXIMUM: Final = 64
_SLOT: Final = 1 + MAXIMUM


class AddressPage:
    """The service's side."""

    def __init__(self, path: Path, *, is_new: bool) -> None:
        """Errors: OSError when there is none (and `is_new` is false), or it is not ours."""
        self._map = map_page(path, is_new=is_new)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")

    def write(self, addresses: Iterable[int]) -> None:
        """From now on the guest has these. Errors: ValueError for more than MAXIMUM."""
        wanted = sorted(set(addresses))
        if len(wanted) > MAXIMUM:
            raise ValueError(f"{len(wanted)} addresses exceed {MAXIMUM}")
        version = self._words[0] + 1
        base = 1 + (version & 1) * _SLOT
        for index, address in enumerate(wanted):
            self._words[base + 1 + index] = address
        self._words[base] = len(wanted)
        self._words[0] = version

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._map.close()


class AddressView:
    """The worker's side: `word` changes whenever the addresses do."""

    def __init__(self, fd: int) -> None:
        """The page behind `fd`, or -1: a page of nothing."""
        if fd < 0:
            self.word = memoryview(array("Q", bytes(PAGE_BYTES)))
        else:
            self.word = memoryview(mmap.mmap(fd, PAGE_BYTES, prot=mmap.PROT_READ)).cast("Q")

    def read(self) -> tuple[int, list[int]]:
        """The version, and the addresses of that version."""
        while True:
            version = self.word[0]
            base = 1 + (version & 1) * _SLOT
            addresses = list(self.word[base + 1 : base + 1 + min(self.word[base], MAXIMUM)])
            if self.word[0] == version:
                return version, addresses

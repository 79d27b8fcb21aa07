"""A machine's gate page: one 64-bit word says which operations its devices may do; then the revision and the limits.

The page is a file of the machine's run directory, written by the service alone: a later service finds it there, and
a worker has it mapped for reading only, so that a worker taken over by its guest cannot widen it. One aligned store
changes every device's mind (x86-64: stores of eight aligned bytes are whole).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from rayos_vmm.shared.page import map_page

PAGE_NAME: Final = "gate.page"
#: Words of the page behind mask and revision; rates in bytes a second, sizes in bytes, 0 for none.
AUDITED: Final = 2
NET_RATE: Final = 3
DISK_RATE: Final = 4
DISK_SIZE: Final = 5
GPU_MEMORY: Final = 6
INPUT_QUEUE: Final = 7
#: Requests that a disk works on at once.
DISK_AT_ONCE: Final = 8


class Words(msgspec.Struct, frozen=True):
    """A gate page. Rates in bytes a second, sizes in bytes, 0 for none beside the quota's; `audited` has a bit for each
    operation."""

    mask: int
    revision: int
    audited: int = 0
    net_rate: int = 0
    disk_rate: int = 0
    disk_size: int = 0
    gpu_memory: int = 0
    input_queue: int = 0
    disk_at_once: int = 0


class GatePage:
    """The page of one machine. `write` acts on the running devices at once."""

    def __init__(self, path: Path, *, is_new: bool) -> None:
        """Errors: OSError when there is none (and `is_new` is false)."""
        self._map = map_page(path, is_new=is_new)
        self._bytes = memoryview(self._map)
        self._word = self._bytes.cast("Q")

    @property
    def mask(self) -> int:
        """The operations that are allowed now."""
        return self._word[0]

    def write(self, words: Words) -> None:
        """The mask at once; the revision last: whoever sees it sees the others."""
        self._word[0] = words.mask
        self._word[AUDITED] = words.audited
        self._word[NET_RATE] = words.net_rate
        self._word[DISK_RATE] = words.disk_rate
        self._word[DISK_SIZE] = words.disk_size
        self._word[GPU_MEMORY] = words.gpu_memory
        self._word[INPUT_QUEUE] = words.input_queue
        self._word[DISK_AT_ONCE] = words.disk_at_once
        self._word[1] = words.revision

    def close(self) -> None:
        self._word.release()
        self._bytes.release()
        self._map.close()

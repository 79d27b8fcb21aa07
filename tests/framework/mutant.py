"""`python -P -m tests.framework.mutant`: a parent of keepers whose workers acknowledge writes before they are done.

The bug that the kill harness must find: a write is held back until a few more have come, and answered at once. It
needs interpreted code (RAYOS_PURE=1), whose classes can be changed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from typing import Final

from rayos_devices.native import Buffers
from rayos_vmm.worker.spawner import main
from tests.framework.synchronous import no_uring

#: Writes that are acknowledged and not done.
HELD: Final = 4

_held: deque[tuple[int, bytes, int]] = deque()


def _too_early(buffers: Buffers, fd: int, offset: int, _flags: int) -> int:
    words = buffers._words
    vectors = [(words[2 * index], words[2 * index + 1]) for index in range(buffers.count)]
    data = b"".join(ctypes.string_at(address, length) for address, length in vectors)
    _held.append((fd, data, offset))
    if len(_held) > HELD:
        fd, data, offset = _held.popleft()
        os.pwritev(fd, [data], offset)
    return len(data)


no_uring()
Buffers.write = _too_early  # type: ignore[method-assign, assignment]

if __name__ == "__main__":
    sys.exit(main())

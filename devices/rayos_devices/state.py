"""Device state that outlives its worker, changed exactly once per completed chain.

What a device knows beside guest memory (a console's open ports, a GPU's resource table) is written here, into shared
memory held by the keeper, *before* the used index that makes it true is published. Two slots alternate. A successor
reads the newest sound slot and asks the ring: is the used index already there? If so the chain was completed and
the state holds; if not, the driver still waits, the older slot is the truth and the chain is simply handled again.
So the 16-bit store of the used index is the commit point of both, and kill -9 may come between any two instructions.

Slot: sequence u64, payload length u32, queue u16, used index u16, committed u8, 3 pad, crc32 u32; payload.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Callable
from typing import Final

_HEADER: Final = struct.Struct("<QIHHB3xI")
_CRC: Final = struct.Struct("<QIHH")
_COMMITTED: Final = 16
NO_QUEUE: Final = 0xFFFF


class StateStore:
    """Two slots in a memfd (or private memory when `fd` is None: a backend served alone)."""

    def __init__(self, fd: int | None, capacity_bytes: int) -> None:
        """`capacity_bytes` is the most one state may take; the descriptor stays the caller's."""
        self.capacity_bytes = capacity_bytes
        self._stride = _HEADER.size + capacity_bytes
        size = 2 * self._stride
        if fd is not None and os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        self._map = mmap.mmap(-1, size) if fd is None else mmap.mmap(fd, size)
        self._sequence = 0
        self._open_slot = -1

    def load(self, is_published: Callable[[int, int], bool]) -> bytes | None:
        """The state that is true, or None at the first start.

        `is_published(queue, used_index)` says whether that queue's used index has reached `used_index`.
        """
        found = sorted((slot for slot in map(self._read, (0, 1)) if slot is not None), reverse=True)
        for age, (sequence, queue, used, committed, payload) in enumerate(found):
            # The older slot held before the newer one was written.
            if age or committed or queue == NO_QUEUE or is_published(queue, used):
                self._sequence = sequence
                self._open_slot = sequence % 2
                self.commit()
                return payload
        return None

    def _read(self, slot: int) -> tuple[int, int, int, int, bytes] | None:
        base = slot * self._stride
        sequence, length, queue, used, committed, crc = _HEADER.unpack_from(self._map, base)
        if sequence == 0 or length > self.capacity_bytes:
            return None
        payload = self._map[base + _HEADER.size : base + _HEADER.size + length]
        if crc != zlib.crc32(payload, zlib.crc32(_CRC.pack(sequence, length, queue, used))):
            return None
        return sequence, queue, used, committed, payload

    def save(self, payload: bytes, queue: int = NO_QUEUE, used_index: int = 0) -> None:
        """Write the state that becomes true when `queue`'s used index reaches `used_index` (at once: NO_QUEUE).

        One save a publish: the state saved before must be committed by now.

        Errors: ValueError when the payload exceeds the capacity; the caller bounds its state, so that is our bug.
        """
        if len(payload) > self.capacity_bytes:
            raise ValueError(f"a state of {len(payload)} bytes exceeds {self.capacity_bytes}")
        self._sequence += 1
        slot = self._sequence % 2
        base = slot * self._stride
        crc = zlib.crc32(payload, zlib.crc32(_CRC.pack(self._sequence, len(payload), queue, used_index)))
        # Payload first, the checksummed header last: a torn slot is a slot that never was.
        self._map[base : base + 8] = bytes(8)
        self._map[base + _HEADER.size : base + _HEADER.size + len(payload)] = payload
        self._map[base : base + _HEADER.size] = _HEADER.pack(
            self._sequence, len(payload), queue, used_index, queue == NO_QUEUE, crc
        )
        self._open_slot = slot

    def commit(self) -> None:
        """After the publish: the state holds, whatever the used index does from now on."""
        if self._open_slot >= 0:
            self._map[self._open_slot * self._stride + _COMMITTED] = 1
            self._open_slot = -1

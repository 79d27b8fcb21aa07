"""The driver's side of a packed virtqueue (VIRTIO 1.3, 2.8), honest or not, with the surface of the split one's.

Descriptors are laid out aside, by number as in a split table; `offer` follows a chain and writes it into the ring, a
loop until the ring is full of it. A head is the buffer's id.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Final

from tests.framework.driver import DESC_F_NEXT, DriverQueue

# VIRTIO 1.3, 2.8.1 and 2.8.10, as in driver.py written down a second time.
ELEMENT: Final = struct.Struct("<QIHH")
DESC_F_AVAIL: Final = 1 << 7
DESC_F_USED: Final = 1 << 15
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = range(3)


class PackedDriverQueue(DriverQueue):
    """One queue; `offered` and `done` are its places in the ring, each a descriptor and a wrap counter."""

    is_packed = True
    start = 0x80008000

    @staticmethod
    def area_bytes(size: int) -> tuple[int, int]:
        return 4, 4

    def reset(self) -> None:
        super().reset()
        self._laid: dict[int, tuple[int, int, int, int]] = {}
        self._counts: dict[int, int] = {}
        self.offered = self._kicked = self.done = (0, 1)
        self._since_kick = 0

    def step(self, place: tuple[int, int], count: int) -> tuple[int, int]:
        """The place `count` descriptors behind."""
        at, wrap = place
        at += count
        return (at - self.size, wrap ^ 1) if at >= self.size else (at, wrap)

    # -- raw -----------------------------------------------------------------------------------------------------

    def set_descriptor(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        self._laid[index] = (address, length, flags, following)

    def set_avail_index(self, index: int) -> None:
        """There is none."""

    def set_element(self, at: int, address: int, length: int, identifier: int, flags: int) -> None:
        """One descriptor in the ring, whatever was there; the half with the flags at once and last."""
        ELEMENT.pack_into(self._table, 16 * at, address, length, identifier, self.element(at)[3])
        word = memoryview(self._table).cast("Q")
        word[2 * at + 1] = length | identifier << 32 | flags << 48

    def element(self, at: int) -> tuple[int, int, int, int]:
        """Address, length, id, flags."""
        return ELEMENT.unpack_from(self._table, 16 * at)

    def is_used(self, place: tuple[int, int]) -> bool:
        at, wrap = place
        flags = self.element(at)[3]
        return bool(flags & DESC_F_AVAIL) == bool(flags & DESC_F_USED) == bool(wrap)

    @property
    def used_index(self) -> int:
        """How many chains the device has completed, of those offered."""
        return self._completed()[0]

    @property
    def device_base(self) -> int:
        at, wrap = self._completed()[1]
        return (at | wrap << 15) * 0x10001

    def _completed(self) -> tuple[int, tuple[int, int]]:
        """Also the place behind the last one."""
        count, place = self._used_index, self.done
        seen = 0
        while seen < self.size and self.is_used(place):
            length = self._counts.get(self.element(place[0])[2], 1)
            place, seen, count = self.step(place, length), seen + length, count + 1
        return count & 0xFFFF, place

    def offer(self, heads: Sequence[int]) -> None:
        """Write the chains into the ring, each one's first flags last; does not kick."""
        for head in heads:
            chain, index = [self._laid[head]], self._laid[head][3]
            while chain[-1][2] & DESC_F_NEXT and len(chain) <= self.size:
                chain.append(self._laid.get(index, (self.ram.base, 1, DESC_F_NEXT, index)))
                index = chain[-1][3]
            self.write(chain, head)

    def write(self, chain: Sequence[tuple[int, int, int, int]], identifier: int) -> None:
        """One chain of (address, length, flags, …) from the next place on."""
        self._counts[identifier] = len(chain)
        places = [self.step(self.offered, index) for index in range(min(len(chain), self.size))]
        for (address, length, flags, *_), (at, wrap) in reversed(list(zip(chain, places, strict=False))):
            flags |= DESC_F_AVAIL if wrap else DESC_F_USED
            self.set_element(at, address, length, identifier, flags)
        self.offered = self.step(self.offered, len(places))
        self._since_kick += len(places)
        self._avail_index = (self._avail_index + 1) & 0xFFFF

    @staticmethod
    def pack_table(buffers: Sequence[tuple[int, int, int]]) -> bytes:
        return b"".join(ELEMENT.pack(address, length, 0, flags) for address, length, flags in buffers)

    # -- chains --------------------------------------------------------------------------------------------------

    def collect(self) -> list[tuple[int, int]]:
        entries: list[tuple[int, int]] = []
        while True:
            while self.is_used(self.done):
                _, written, head, _ = self.element(self.done[0])
                entries.append((head, written))
                self.free.extend(reversed(self._chains.pop(head, [])))
                self.done = self.step(self.done, self._counts.get(head, 1))
                self._used_index = (self._used_index + 1) & 0xFFFF
            if not self.arm():
                return entries

    def reap(self) -> array[int]:
        return array("I", [head for head, _ in self.collect()])

    # -- notifications -------------------------------------------------------------------------------------------

    def needs_kick(self) -> bool:
        word, flags = self._used
        if flags & 3 != EVENT_DESC:
            return flags & 3 != EVENT_DISABLE
        at, wrap = self.offered
        event = (word & 0x7FFF) - (self.size if word >> 15 != wrap else 0)
        return (at - event - 1) & 0xFFFF < self._since_kick

    def kick(self, *, always: bool = False) -> None:
        super().kick(always=always)
        self._since_kick = 0

    def arm(self, ahead: int = 0) -> bool:
        at, wrap = self.step(self.done, ahead)
        self._avail.cast("B").cast("I")[0] = (
            at | wrap << 15 | EVENT_DESC << 16 if self.event_idx else EVENT_ENABLE
        )
        return self.is_used((at, wrap))

    def disarm(self) -> None:
        self._avail[1] = EVENT_DISABLE

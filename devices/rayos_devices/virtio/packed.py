"""The packed virtqueue, device side: positions, flags and what survives a kill (VIRTIO 1.3, 2.8).

One ring of 16-byte descriptors, ``addr u64, len u32, id u16, flags u16``, in which the driver marks what is available
and the device what is used, each with the AVAIL and USED bits set against its wrap counter. Two more words tell each
side of what the other wants to hear: ``offset u15, wrap u1, flags u2``.

The second half of a descriptor is one aligned u64: it is read once, so availability, length and id are of one moment,
and a used descriptor appears by one store. A chain is named by the slot of its first descriptor.

Completing one overwrites what the driver wrote, so a successor could not read it again, and no position is in guest
memory. Hence the journal, in memory that outlives the worker, a word for the position and one for each chain:

1. `push` notes id, length and descriptor count; nothing is completed yet.
2. `publish` stores the position word with the number of notes: that one store commits the whole batch.
3. The used descriptors are stored in order, then the position word behind the batch, with no notes.

Killed before 2, the successor finds the ring untouched and takes the chains again. Killed after it, the successor does
step 3 again: a slot whose USED bit equals the wrap counter is done (also if the driver has offered it anew: that
leaves the bit), the others are not. So nothing is lost or completed twice, and the count of completed chains, in
the same word, is what a device's state commits by (devices/rayos_devices/state.py). The order of stores is that of
x86 and of `order` elsewhere. Right for queues that are completed in order, as all are. Compiled with packed.pxd.
"""

from __future__ import annotations

from array import array
from typing import Final

from rayos_devices.native import fence, order
from rayos_devices.virtio.layout import (
    DESC_F_AVAIL,
    DESC_F_USED,
    DESC_F_WRITE,
    EVENT_DESC,
    EVENT_DISABLE,
    MAX_QUEUE_SIZE,
    PACKED_START,
)

#: Words of a queue's journal: the position, and a note for each chain of a batch.
JOURNAL_WORDS: Final = 1 + MAX_QUEUE_SIZE
JOURNAL_BYTES: Final = 8 * JOURNAL_WORDS
#: Of the position word, above offset u15, wrap u1, notes u16, completed u16: the ring is live.
_LIVE: Final = 1 << 48


def forget_position(journal: memoryview) -> None:
    """The queue was stopped: it goes on where its frontend says, not where a worker was."""
    journal[0] &= ~_LIVE


def is_packed_base(base: int, size: int) -> bool:
    """Whether the positions (as `PackedRing.base`) are inside the ring, and not further apart than it is long."""
    taken, used = base & 0x7FFF, base >> 16 & 0x7FFF
    return taken < size and used < size and 0 <= _in_flight(base, size) <= size


def _in_flight(base: int, size: int) -> int:
    """Descriptors between the two positions."""
    around = size if (base >> 15 ^ base >> 31) & 1 else 0
    return (base & 0x7FFF) - (base >> 16 & 0x7FFF) + around


class PackedRing:
    """A queue's positions in its ring.

    `peek` and `load` leave a descriptor in `address`, `length`, `id` and `flags`; `room` is how many descriptors are
    not in flight.
    """

    def __init__(
        self,
        size: int,
        descriptors: memoryview,
        driver: memoryview,
        device: memoryview,
        journal: memoryview,
        base: int,
        *,
        resumed: bool,
        event_idx: bool,
    ) -> None:
        """Goes on from `base`, which was checked, or where the journal says if `resumed` and it was live."""
        self.size = size
        self._words = descriptors.cast("Q")
        self._driver = driver.cast("I")
        self._device = device.cast("I")
        self._journal = journal
        self._event_idx = event_idx
        self._ids = memoryview(array("H", bytes(2 * size)))
        self._counts = memoryview(array("H", bytes(2 * size)))
        self.address = 0
        self.length = 0
        self.id = 0
        self.flags = 0
        self.room = 0
        self._before = 0
        self._notes = 0
        position = journal[0]
        self.completed = position >> 32 & 0xFFFF
        self.is_unused = False
        notes = position >> 16 & 0xFFFF
        if resumed and position & _LIVE and position & 0x7FFF < size and notes <= size:
            self._used = position & 0x7FFF
            self._used_wrap = position >> 15 & 1
            self._store(notes, False)
            self.slot = self._used
            self._wrap = self._used_wrap
            self.room = size
        else:
            self.slot = base & 0x7FFF
            self._wrap = base >> 15 & 1
            self._used = base >> 16 & 0x7FFF
            self._used_wrap = base >> 31
            self.room = size - _in_flight(base, size)
            # Twice around, the last descriptor is not as its driver zeroed it.
            self.is_unused = (
                base == PACKED_START and not self._words[2 * size - 2] | self._words[2 * size - 1]
            )
        self._mark(0)

    @property
    def base(self) -> int:
        """Next available u15, its wrap counter u1, next used u15, its wrap counter u1: as vhost-user tells it."""
        return self.slot | self._wrap << 15 | self._used << 16 | self._used_wrap << 31

    def _mark(self, notes: int) -> None:
        completed = self.completed
        self._journal[0] = self._used | self._used_wrap << 15 | notes << 16 | completed << 32 | _LIVE

    # -- available -----------------------------------------------------------------------------------------------

    def peek(self) -> bool:
        """Whether the next descriptor is available; it is loaded."""
        self.load(0)
        available, used = self.flags >> 7 & 1, self.flags >> 15
        return available == self._wrap and used != self._wrap

    def load(self, ahead: int) -> None:
        """The descriptor `ahead` of the next available one."""
        at = self.slot + ahead
        if at >= self.size:
            at -= self.size
        word = self._words[2 * at + 1]
        order()
        self.address = self._words[2 * at]
        self.length = word & 0xFFFFFFFF
        self.id = word >> 32 & 0xFFFF
        self.flags = word >> 48

    def take(self, count: int) -> None:
        """The next `count` descriptors are a chain, the last of which is loaded and has its id."""
        self._ids[self.slot] = self.id
        self._counts[self.slot] = count
        self.room -= count
        self.slot += count
        if self.slot >= self.size:
            self.slot -= self.size
            self._wrap ^= 1

    def untake(self, head: int) -> None:
        """Give back the chain that was taken last."""
        if head >= self.slot:
            self._wrap ^= 1
        self.slot = head
        self.room += self._counts[head]

    # -- used ----------------------------------------------------------------------------------------------------

    @property
    def next_completed(self) -> int:
        return (self.completed + self._notes) & 0xFFFF

    def push(self, head: int, written: int) -> None:
        """Note that a chain is done; `publish` makes it so."""
        self._notes += 1
        identifier, count = self._ids[head], self._counts[head]
        self._journal[self._notes] = written | identifier << 32 | count << 48

    def publish(self) -> int:
        """Complete what was pushed; how many chains."""
        notes = self._notes
        if notes:
            self.completed = (self.completed + notes) & 0xFFFF
            order()
            self._mark(notes)
            self._store(notes, True)
            self._notes = 0
            order()
            self._mark(0)
        return notes

    def _store(self, notes: int, is_first: bool) -> None:
        """Step 3; not `is_first`: again, for a predecessor."""
        self._before = self._used
        for index in range(1, notes + 1):
            note = self._journal[index]
            at = self._used
            if is_first or self._words[2 * at + 1] >> 63 != self._used_wrap:
                flags = DESC_F_AVAIL | DESC_F_USED if self._used_wrap else 0
                if note & 0xFFFFFFFF:
                    flags |= DESC_F_WRITE
                order()
                self._words[2 * at + 1] = note & 0xFFFFFFFFFFFF | flags << 48
            self._used = at + (note >> 48)
            self.room += note >> 48
            if self._used >= self.size:
                self._used -= self.size
                self._used_wrap ^= 1

    def wants_call(self) -> bool:
        """Whether the driver asked to hear of what was published last (2.8.10); after a fence."""
        word = self._driver[0]
        flags = word >> 16 & 3
        if flags != EVENT_DESC or not self._event_idx:
            return flags != EVENT_DISABLE
        event = word & 0x7FFF
        if word >> 15 & 1 != self._used_wrap:
            event -= self.size
        new, old = self._used, self._before
        if new <= old:
            old -= self.size
        return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF

    def ask_for_kick(self) -> bool:
        """At the next available descriptor, where the feature allows it: else at each. Whether anything was stored."""
        if self._event_idx:
            self._device[0] = self.slot | self._wrap << 15 | EVENT_DESC << 16
            fence()
        return self._event_idx

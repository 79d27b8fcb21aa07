"""A virtqueue, device side (VIRTIO 1.3, 2.7 and 2.8), with indirect descriptors and event index.

Which ring it is, the driver's features tell when it is attached; the packed one has its positions in `packed.py`, and
what follows is of the split one. Three areas lie in guest memory and are the driver's to rewrite at any time; each
field is read once:

* descriptor table: 16 bytes a descriptor, ``addr u64, len u32, flags u16, next u16``
* avail ring: ``flags u16, idx u16, ring[size] u16, used_event u16``
* used ring: ``flags u16, idx u16, ring[size] {id u32, len u32}, avail_event u16``

Invariants of both: chains are popped in avail order; a queue that broke the rules is latched and not parsed again until
`stop`. The used index is stored after the entries it covers, with one 16-bit store (`memoryview.cast("H")`;
`struct.pack_into` clears first and a driver saw the zeros). Compiled with vring.pxd; interpreted it is the same code.
"""

from __future__ import annotations

from array import array
from typing import cast

from rayos_devices.errors import QueueError
from rayos_devices.native import fence, signal, take_signal
from rayos_devices.virtio.chain import Chain
from rayos_devices.virtio.layout import (
    AVAIL_F_NO_INTERRUPT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESCRIPTOR_BYTES,
    EVENT_BYTES,
    MAX_CHAIN_BYTES,
    MAX_QUEUE_SIZE,
    NOTHING,
    USED_ELEMENT_BYTES,
    USED_HEADER_BYTES,
    descriptor_table_bytes,
    used_ring_bytes,
)
from rayos_devices.virtio.log import DirtyLog
from rayos_devices.virtio.memory import MAX_REGIONS, GuestMemory, Region
from rayos_devices.virtio.packed import JOURNAL_BYTES, PackedRing

#: Fills the array of regions, which is never read beyond `count`.
_NO_REGION = cast("Region", None)
_NO_LOG = cast("DirtyLog", None)
_NO_RING = cast("PackedRing", None)
_NO_JOURNAL = memoryview(b"")
#: Pieces of a chain: a buffer each, and more where one lies across regions (`_add_across`).
_PIECES = 2 * MAX_QUEUE_SIZE + MAX_REGIONS + 1


class Vring:
    """One queue. `attach` makes it live; `pop`, `push`, `publish` and `arm` are the data path.

    `take` is `pop` without objects: it leaves the chain in `count`, `readable_count` and, a buffer each, `regions`,
    `starts` (bytes into the region), `addresses` (in this process) and `lengths`.

    Counters: `chain_errors` chains returned unused, `requests` chains popped, `calls` notifications sent.
    `broken` holds the sentence of the fault that latched the queue, else the empty string.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 0
        self.attached = False
        self.broken = ""
        self.call_fd = -1
        self.error_fd = -1
        self.requests = 0
        self.chain_errors = 0
        self.calls = 0
        self.kicks = 0
        #: Its owner looks by himself: `arm` asks for no kick.
        self.is_polled = False
        #: Where a packed ring's positions outlive the worker: JOURNAL_BYTES as words, none: nowhere.
        self.journal = _NO_JOURNAL
        self._last_avail = 0
        self._used_idx = 0
        #: Written to the last writable byte of a chain that cannot be used, where it can be reached; below 0: nothing.
        self.fault_status = -1
        self.starts = memoryview(array("Q", bytes(8 * _PIECES)))
        self.lengths = memoryview(array("Q", bytes(8 * _PIECES)))
        self.addresses = memoryview(array("Q", bytes(8 * _PIECES)))
        self._detach()

    def _detach(self) -> None:
        empty = memoryview(bytearray(0))
        self.memory = GuestMemory()
        self.regions: list[Region] = [_NO_REGION] * _PIECES
        self.count = 0
        self.readable_count = 0
        self.readable_bytes = 0
        self.writable_bytes = 0
        self._desc64 = empty.cast("Q")
        self._desc32 = empty.cast("I")
        self._desc16 = empty.cast("H")
        self._avail = empty.cast("H")
        self._used = empty.cast("H")
        self._used_elements = empty.cast("I")
        self._busy = memoryview(bytearray(0))
        self._ring = _NO_RING
        self._is_packed = False
        self._mask = 0
        self._event_idx = False
        self._indirect = False
        self._notify_on_empty = False
        self._signalled = False
        self._is_logged = False
        self._log = _NO_LOG
        self._used_at = 0
        self._descriptors_at = 0
        self._written: dict[int, list[tuple[int, int]]] = {}
        self._avail_shadow = self._last_avail
        self._used_published = self._used_idx
        self.attached = False

    def attach(
        self,
        memory: GuestMemory,
        size: int,
        descriptors: memoryview,
        avail: memoryview,
        used: memoryview,
        *,
        base: int,
        resumed: bool = False,
        packed: bool = False,
        event_idx: bool,
        indirect: bool,
        notify_on_empty: bool = False,
        log: DirtyLog | None = None,
        used_address: int = 0,
        descriptors_address: int = 0,
    ) -> None:
        """Starts on three views of exactly the lengths that layout.py gives for `size`. A packed ring's last two are
        the driver's and the device's event suppression.

        `base` is where to go on, as `stop` returned it. `resumed`, after the former backend died: where that was, as
        the used index in guest memory tells, or the journal; right for a queue that is completed in order. `log` is
        told of every page that is written; the addresses are where in guest memory it has what the device writes.
        """
        self.memory = memory
        self.size = size
        self._mask = size - 1
        self._is_packed = packed
        if packed:
            if not self.journal:
                self.journal = memoryview(bytearray(JOURNAL_BYTES)).cast("Q")
            self._ring = PackedRing(
                size, descriptors, avail, used, self.journal, base, resumed=resumed, event_idx=event_idx
            )
        else:
            self._attach_split(size, descriptors, avail, used)
            self._last_avail = self._avail_shadow = self._used_idx if resumed else base
        self._event_idx = event_idx
        self._indirect = indirect
        self._notify_on_empty = notify_on_empty
        self._signalled = False
        self._is_logged = log is not None
        self._log = cast("DirtyLog", log)
        self._used_at = used_address
        self._descriptors_at = descriptors_address
        self._log_used()
        self.broken = ""
        self.attached = True

    def _attach_split(self, size: int, descriptors: memoryview, avail: memoryview, used: memoryview) -> None:
        self._desc64 = descriptors.cast("Q")
        self._desc32 = descriptors.cast("I")
        self._desc16 = descriptors.cast("H")
        self._avail = avail.cast("H")
        self._used = used.cast("H")
        self._used_elements = used[USED_HEADER_BYTES : USED_HEADER_BYTES + USED_ELEMENT_BYTES * size].cast(
            "I"
        )
        self._used_idx = self._used_published = self._used[1]
        self._busy = memoryview(bytearray(size))

    def stop(self) -> int:
        """Let go of guest memory; returns where a successor starts: the avail index, or `PackedRing.base`."""
        base = self._ring.base if self._ring is not None else self._last_avail
        self._detach()
        self.broken = ""
        return base

    @property
    def used_index(self) -> int:
        """The used index as last stored, in a packed ring how many chains were: what commits a saved device state."""
        return self._ring.completed if self._ring is not None else self._used_published

    @property
    def next_used_index(self) -> int:
        """The value that `used_index` will have after the next `publish`."""
        return self._ring.next_completed if self._ring is not None else self._used_idx

    @property
    def is_unused(self) -> bool:
        """No chain was ever completed in this ring: its driver has just made it (and zeroed it: VIRTIO 1.3, 2.7).

        A used index of 0 that wrapped is told by the ring's last entry.
        """
        if self._ring is not None:
            return self._ring.is_unused
        last = 2 * (self.size - 1)
        return self._used_idx == 0 and self._used_elements[last] == 0 and self._used_elements[last + 1] == 0

    def latch(self, reason: str) -> QueueError:
        """Mark the queue broken (class Q) and tell the frontend; returns the error to raise."""
        self.broken = f"queue {self.index}: {reason}"
        signal(self.error_fd)
        return QueueError(self.broken)

    def pop(self) -> Chain | None:
        """The next available chain, or None. Chain faults are answered here and skipped.

        Errors: QueueError once when the driver broke the ring; afterwards None until `stop`.
        """
        head = self.take()
        return None if head == NOTHING else self.chain(head)

    def chain(self, head: int) -> Chain:
        """The chain that was taken last, as views of its buffers."""
        views = []
        for index in range(self.count):
            start = self.starts[index]
            views.append(self.regions[index].view[start : start + self.lengths[index]])
        split = self.readable_count
        return Chain(head, views[:split], self.readable_bytes, views[split:], self.writable_bytes)

    def take(self) -> int:
        """The head of the next available chain, its buffers in the arrays; NOTHING when there is none.

        Errors: as `pop`.
        """
        if self._is_packed:
            return self._take_packed()
        while True:
            last = self._last_avail
            if last == self._avail_shadow:
                if not self.attached or self.broken:
                    return NOTHING
                shadow = self._avail[1]
                waiting = (shadow - last) & 0xFFFF
                if waiting == 0:
                    return NOTHING
                if waiting > self.size:
                    raise self.latch(f"avail index jumped by {waiting}, the queue holds {self.size}")
                self._avail_shadow = shadow
            elif self.broken:
                return NOTHING
            head = self._avail[2 + (last & self._mask)]
            if head >= self.size:
                raise self.latch(f"head {head} is outside a table of {self.size} descriptors")
            if self._busy[head]:
                raise self.latch(f"head {head} was offered again while in flight")
            self._last_avail = (last + 1) & 0xFFFF
            self.requests += 1
            is_sound = self._walk(head)
            self._busy[head] = 1
            if self._is_logged:
                self._note(head)
            if is_sound:
                return head
            self.chain_errors += 1
            self.push(head, 0)

    def unpop(self, head: int) -> None:
        """Give the chain that was popped last back to the queue, untouched."""
        self._written.pop(head, None)
        self.requests -= 1
        if self._is_packed:
            self._ring.untake(head)
        else:
            self._busy[head] = 0
            self._last_avail = (self._last_avail - 1) & 0xFFFF

    def _take_packed(self) -> int:
        ring = self._ring
        while self.attached and not self.broken and ring.peek():
            head = ring.slot
            is_sound = self._walk_packed(ring)
            self.requests += 1
            if self._is_logged:
                self._note(head)
            if is_sound:
                return head
            self.chain_errors += 1
            self.push(head, 0)
        return NOTHING

    def _walk_packed(self, ring: PackedRing) -> bool:
        """As `_walk`, from the descriptor that is loaded; the chain is taken."""
        self._clear()
        limit = ring.room
        if limit == 0:
            raise self.latch("a descriptor was offered again while in flight")
        seen = 1
        if ring.flags & DESC_F_INDIRECT:
            is_sound = self._walk_indirect(ring.address, ring.length, ring.flags)
        else:
            is_sound = self._add(ring.address, ring.length, ring.flags)
            while ring.flags & DESC_F_NEXT:
                seen += 1
                if seen > limit:
                    raise self.latch(
                        f"a descriptor chain longer than {limit}: it runs into its own, or others'"
                    )
                ring.load(seen - 1)
                if ring.flags & DESC_F_INDIRECT:
                    raise self.latch("an indirect descriptor inside a chain")
                is_sound &= self._add(ring.address, ring.length, ring.flags)
            if not is_sound:
                self._spoil(ring.address, ring.length, ring.flags)
        ring.take(seen)
        return is_sound

    # -- the log of a migration: slow, and only while there is one ------------------------------------------------

    def _note(self, head: int) -> None:
        """Remember where the chain that was taken last may be written."""
        ranges = []
        for index in range(self.readable_count, self.count):
            region = self.regions[index]
            ranges.append((region.guest_address + self.starts[index], self.lengths[index]))
        self._written[head] = ranges

    def _log_written(self, head: int) -> None:
        for address, length in self._written.pop(head, ()):
            self._log.mark(address, length)

    def _log_used(self) -> None:
        if not self._is_logged:
            return
        if self._is_packed:
            self._log.mark(self._descriptors_at, descriptor_table_bytes(self.size))
            self._log.mark(self._used_at, EVENT_BYTES)
        else:
            self._log.mark(self._used_at, used_ring_bytes(self.size))

    def _clear(self) -> None:
        self.count = 0
        self.readable_count = 0
        self.readable_bytes = 0
        self.writable_bytes = 0

    def _walk(self, head: int) -> bool:
        """Fill the arrays; False for a chain fault (class C)."""
        self._clear()
        address = self._desc64[2 * head]
        length = self._desc32[4 * head + 2]
        flags = self._desc16[8 * head + 6]
        following = self._desc16[8 * head + 7]
        if flags & DESC_F_INDIRECT:
            return self._walk_indirect(address, length, flags)
        is_sound = True
        limit = self.size
        seen = 1
        while True:
            is_sound &= self._add(address, length, flags)
            if not flags & DESC_F_NEXT:
                return is_sound or self._spoil(address, length, flags)
            seen += 1
            if seen > limit:
                raise self.latch(f"a descriptor chain longer than {limit}: it loops")
            if following >= limit:
                raise self.latch(f"next descriptor {following} is outside a table of {limit}")
            address = self._desc64[2 * following]
            length = self._desc32[4 * following + 2]
            flags = self._desc16[8 * following + 6]
            following = self._desc16[8 * following + 7]
            if flags & DESC_F_INDIRECT:
                raise self.latch("an indirect descriptor inside a chain")

    def _walk_indirect(self, address: int, length: int, flags: int) -> bool:
        if not self._indirect:
            raise self.latch("an indirect descriptor without the feature")
        if flags & DESC_F_NEXT:
            raise self.latch("a descriptor with both INDIRECT and NEXT")
        limit = length // DESCRIPTOR_BYTES
        if length % DESCRIPTOR_BYTES or limit < 1 or limit > MAX_QUEUE_SIZE:
            raise self.latch(
                f"an indirect table of {length} bytes: multiples of 16 up to {MAX_QUEUE_SIZE * 16} are allowed"
            )
        region = self.memory.find(address, length)
        base = 0
        if region is not None:
            base = address - region.guest_address
        if region is None or base % DESCRIPTOR_BYTES:
            # Nothing asks the driver to align it (2.7.5.3), and a Linux with SLUB debugging does not; or to keep it in
            # one region.
            region = self.memory.copy(address, length)
            base = 0
            if region is None:
                raise self.latch(f"an indirect table at {address:#x} of {length} bytes outside guest memory")
        base //= DESCRIPTOR_BYTES
        is_sound = True
        seen = 1
        index = 0
        while True:
            at = base + index
            address = region.ram64[2 * at]
            length = region.ram32[4 * at + 2]
            if self._is_packed:  # in a row, without NEXT (2.8.7)
                flags = region.ram16[8 * at + 7]
                index = seen
                has_next = seen < limit
            else:
                flags = region.ram16[8 * at + 6]
                index = region.ram16[8 * at + 7]
                has_next = flags & DESC_F_NEXT != 0
            if flags & DESC_F_INDIRECT:
                raise self.latch("a nested indirect descriptor")
            is_sound &= self._add(address, length, flags)
            if not has_next:
                return is_sound or self._spoil(address, length, flags)
            seen += 1
            if seen > limit:
                raise self.latch(f"an indirect chain longer than {limit}: it loops")
            if index >= limit:
                raise self.latch(f"next descriptor {index} is outside a table of {limit}")

    def _add(self, address: int, length: int, flags: int) -> bool:
        """Append one buffer; False when it breaks the chain."""
        region = self.memory.find(address, length)
        if region is None:
            return self._add_across(address, length, flags)
        if flags & DESC_F_WRITE:
            self.writable_bytes += length
        elif self.writable_bytes or self.count > self.readable_count:
            return False  # device-readable behind device-writable
        else:
            self.readable_bytes += length
        if self.readable_bytes + self.writable_bytes > MAX_CHAIN_BYTES:
            return False
        if length == 0:
            return True
        if self.regions[self.count] is not region:
            self.regions[self.count] = region
        start = address - region.guest_address
        self.starts[self.count] = start
        self.addresses[self.count] = region.address + start
        self.lengths[self.count] = length
        self.count += 1
        if not flags & DESC_F_WRITE:
            self.readable_count += 1
        return True

    def _add_across(self, address: int, length: int, flags: int) -> bool:
        """Append one buffer that lies across regions which touch; False when they do not, or it is in too many."""
        if length == 0:
            return False
        while length:
            region = self.memory.find(address, 1)
            if region is None or self.count > MAX_QUEUE_SIZE:
                return False
            part = length
            if part > region.guest_end - address:
                part = region.guest_end - address
            if not self._add(address, part, flags):
                return False
            address += part
            length -= part
        return True

    def _spoil(self, address: int, length: int, flags: int) -> bool:
        """Write `fault_status` at the end of a bad chain's last buffer, if the driver can be told so; returns False."""
        last = address + length - 1
        if self.fault_status >= 0 and flags & DESC_F_WRITE and length and last >= address:
            region = self.memory.find(last, 1)
            if region is not None:
                region.ram[last - region.guest_address] = self.fault_status
                if self._is_logged:
                    self._log.mark(last, 1)
        return False

    def push(self, head: int, written: int) -> None:
        """Complete a chain with `written` bytes in its writable buffers; the driver sees it at `publish`."""
        if self._is_logged:
            self._log_written(head)
        if self._is_packed:
            self._ring.push(head, written)
            return
        position = (self._used_idx & self._mask) * 2
        self._used_elements[position] = head
        self._used_elements[position + 1] = written
        self._used_idx = (self._used_idx + 1) & 0xFFFF
        self._busy[head] = 0

    def publish(self) -> None:
        """Tell the driver what was pushed, and call it if it asked for that."""
        if self._is_packed:
            self._publish_packed()
            return
        new = self._used_idx
        old = self._used_published
        if new == old:
            return
        self._used[1] = new
        self._used_published = new
        fence()
        if self._is_logged:
            self._log_used()
        if not self._signalled:
            notify = True
            self._signalled = True
        elif self._event_idx:
            used_event = self._avail[2 + self.size]
            notify = ((new - used_event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
        else:
            notify = not self._avail[0] & AVAIL_F_NO_INTERRUPT
        if notify or (self._notify_on_empty and self._is_dry()):
            self.call()

    def _is_dry(self) -> bool:
        """All that the driver made available is used (6.3)."""
        if self._is_packed:
            return self._ring.room == self.size and not self._ring.peek()
        return self._avail[1] == self._last_avail and self._used_idx == self._last_avail

    def _publish_packed(self) -> None:
        if self._ring.publish() == 0:
            return
        fence()
        if self._is_logged:
            self._log_used()
        if not self._signalled or self._ring.wants_call() or (self._notify_on_empty and self._is_dry()):
            self._signalled = True
            self.call()

    def call(self) -> None:
        """Notify the driver; also unasked, once after a take-over, since a predecessor's call may be lost."""
        self.calls += 1
        signal(self.call_fd)

    def is_waiting(self) -> bool:
        """A chain is available now."""
        if not self.attached or self.broken:
            return False
        return self._ring.peek() if self._is_packed else self._avail[1] != self._last_avail

    def take_kick(self, fd: int) -> bool:
        """Empty the kick's eventfd; False when nobody had kicked."""
        if not take_signal(fd):
            return False
        self.kicks += 1
        return True

    def arm(self) -> bool:
        """Ask for a kick at the next available chain, unless `is_polled`; True when one is there (look again)."""
        if not self.attached or self.broken:
            return False
        if self._is_packed:
            if not self.is_polled and self._ring.ask_for_kick() and self._is_logged:
                self._log_used()
            return self._ring.peek()
        if self._event_idx and not self.is_polled:
            self._used[2 + 4 * self.size] = self._last_avail
            fence()
            if self._is_logged:
                self._log_used()
        return self._avail[1] != self._last_avail

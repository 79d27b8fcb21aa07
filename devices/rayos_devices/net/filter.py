"""May this frame pass? What a judge said of a flow is remembered; it is asked for everything else.

`devices` knows no rules: whoever serves a guest hands in a `Judge` (the VMM joins `rayos_net.firewall` and
`rayos_net.guard`).

* **What is judged is what is sent.** The guest may rewrite a frame while it is looked at, so its headers are copied
  once, into a room of ours; that copy is checked and leaves in the place of the guest's bytes. A frame from the network
  is received into the room, so that one which is refused never was in guest memory.
* **Only a plain frame is remembered**: IPv4 without options or IPv6 without extension headers, whole, TCP or UDP with
  sound lengths, not DHCP, from our card to one other or from it to ours. Nothing but addresses, ports and protocol
  tells two such frames apart. All others go to the judge.
* **Memory is fixed**: WAYS entries for each of SETS hashes under a secret; a new flow takes the oldest's place.
* **A verdict holds for one stamp** (`epoch` plus the page's first word: a new table, another lease) and for HOLD_NS, so
  that the judge sees that a flow lives.
* **The checksum and segmentation that a guest asks for** (VIRTIO 1.3, 5.1.6.2) are written into the frame behind our
  back: they must be those of the transport header, else they could change an address after it was checked.
"""

from __future__ import annotations

import secrets
from collections import deque
from typing import Any, Final, Protocol

from rayos_devices.native import Buffers, address_of
from rayos_devices.net.outcome import ACTION_MASK, ALLOW, DENY, HOLDS, MALFORMED, SLOT_SHIFT, SLOTS
from rayos_devices.net.wire import HEAD_BYTES, HEADER_BYTES, MAX_FRAME_BYTES, WHOLE_BYTES

SLOT_MASK: Final = SLOTS - 1

SETS: Final = 1024
SET_MASK: Final = SETS - 1
WAYS: Final = 4
#: An entry: stamp, deadline in ns, protocol and ports, four words of addresses, verdict.
WORDS: Final = 8
HOLD_NS: Final = 1_000_000_000

#: In the room the frame begins here, so that the fields of an IPv4 header lie as their sizes ask.
MARGIN: Final = 2

# The same for the compiled code: C integers, which other modules cannot import.
_WAYS: Final = WAYS
_HOLD: Final = HOLD_NS
_U64: Final = 0xFFFF_FFFF_FFFF_FFFF
_MIX0: Final = 0x9E37_79B9_7F4A_7C15
_MIX1: Final = 0xBF58_476D_1CE4_E5B9
_MIX2: Final = 0x94D0_49BB_1331_11EB
_MIX3: Final = 0xD6E8_FEB8_6659_FD93
_KIND4: Final = 4 << 40
_KIND6: Final = 6 << 40
_NEEDS_CSUM: Final = 1
_GSO_TCP4: Final = 1
_GSO_TCP6: Final = 4
_GSO_ECN: Final = 0x80


class Judge(Protocol):
    """Knows the rules."""

    #: The guest's hardware address.
    mac: bytes
    #: One word: every change ends all that was remembered.
    epoch: memoryview
    #: Likewise, written by another process.
    page: memoryview
    #: SLOTS counters of verdicts.
    hits: memoryview
    #: Frames to deliver in answer to refused ones: (to the guest, the frame). Bounded by the judge.
    answers: deque[tuple[bool, bytes]]

    def judge(self, frame: bytes, is_outgoing: bool, now: float) -> int:
        """An action, HOLDS, and a slot, or MALFORMED; `frame` begins with its Ethernet header, `now` is in seconds.

        What does not hold is counted by the judge.
        """
        ...

    def snapshot(self) -> dict[str, Any]: ...


class Filter:
    """One direction of one queue. `address` is the room for a frame with its header."""

    def __init__(self, judge: Judge, *, is_outgoing: bool) -> None:
        room = bytearray(MARGIN + HEADER_BYTES + MAX_FRAME_BYTES + 64)
        self.room = memoryview(room)[MARGIN:]
        self.address = address_of(room) + MARGIN
        size = len(room) & ~7
        self._bytes = memoryview(room)
        self._halves = memoryview(room)[:size].cast("H")
        self._quads = memoryview(room)[:size].cast("I")
        self._entries = memoryview(bytearray(8 * SETS * WAYS * WORDS)).cast("Q")
        self.judge = judge
        self.is_outgoing = is_outgoing
        self._epoch = judge.epoch
        self._page = judge.page
        self._hits = judge.hits
        own = memoryview(judge.mac).cast("H")
        self._mac0, self._mac1, self._mac2 = own[0], own[1], own[2]
        self._seed = secrets.randbits(64)
        self._last = 0
        #: Off: the judge is asked about every frame.
        self.is_remembering = True
        self._kind = 0
        self._from_low = self._from_high = self._to_low = self._to_high = 0
        #: Verdicts from memory and from the judge; frames whose offload was refused.
        self.remembered = 0
        self.asked = 0
        self.offload = 0
        #: Whether the frame that was refused last was no sound one.
        self.is_malformed = False

    def check(self, buffers: Buffers, size: int, now_ns: int) -> int:
        """ALLOW, DENY or REJECT for a frame of `size` bytes with its header; `buffers` then hold what was judged."""
        if size <= WHOLE_BYTES:
            buffers.redirect(size, self.address)
            return self.decide(size, now_ns)
        head = HEAD_BYTES
        buffers.gather(0, head, self.address)
        verdict = self.recall(size, now_ns)
        if verdict and (verdict != ALLOW or buffers.shadow(head, self.address)):
            return verdict
        buffers.gather(head, size - head, self.address + head)
        buffers.set(self.address, size)
        return verdict if verdict else self.ask(size, now_ns)

    def decide(self, size: int, now_ns: int) -> int:
        """ALLOW, DENY or REJECT for the frame in the room, of `size` bytes with its header."""
        verdict = self.recall(size, now_ns)
        return verdict if verdict else self.ask(size, now_ns)

    def recall(self, size: int, now_ns: int) -> int:
        """The action for the frame in the room; 0: ask."""
        transport = self._plain(size)
        if self.is_outgoing and self._bytes[2] | self._bytes[3] and not self._is_sound_offload(transport):
            self.offload += 1
            self._kind = 0
            self.is_malformed = True
            return DENY
        if self._kind == 0 or not self.is_remembering:
            return 0
        at = self._last
        if not self._is_at(at):  # the flow of the frame before, most often
            at = self._find()
            for _ in range(_WAYS):
                if self._is_at(at):
                    break
                at += WORDS
            else:
                return 0
            self._last = at
        if self._entries[at] != self._epoch[0] + self._page[0] or now_ns >= self._entries[at + 1]:
            return 0
        verdict = self._entries[at + 7]
        self._hits[verdict >> SLOT_SHIFT & SLOT_MASK] += 1
        self.remembered += 1
        self.is_malformed = False
        return verdict & ACTION_MASK

    def _is_at(self, at: int) -> bool:
        """Whether this entry is the flow's."""
        return (
            self._entries[at + 2] == self._kind
            and self._entries[at + 3] == self._from_low
            and self._entries[at + 4] == self._to_low
            and self._entries[at + 5] == self._from_high
            and self._entries[at + 6] == self._to_high
        )

    def _find(self) -> int:
        """Where the set of the flow begins."""
        mixed = self._kind ^ self._seed
        mixed = ((mixed ^ (mixed >> 29)) * _MIX1) & _U64
        mixed = mixed ^ self._from_low ^ ((self._to_low * _MIX0) & _U64)
        mixed = ((mixed ^ (mixed >> 32)) * _MIX2) & _U64
        if self._from_high:  # IPv6
            mixed = mixed ^ self._from_high ^ ((self._to_high * _MIX3) & _U64)
            mixed = ((mixed ^ (mixed >> 32)) * _MIX1) & _U64
        mixed = (mixed ^ (mixed >> 32)) & SET_MASK
        return mixed * (_WAYS * WORDS)

    def ask(self, size: int, now_ns: int) -> int:
        self.asked += 1
        # Before the judge: what changes while it thinks must not be covered by its answer.
        stamp = self._epoch[0] + self._page[0]
        frame = bytes(self.room[HEADER_BYTES:size])
        verdict = self.judge.judge(frame, self.is_outgoing, now_ns * 1e-9)
        self.is_malformed = verdict == MALFORMED
        if verdict & HOLDS:
            self._hits[verdict >> SLOT_SHIFT & SLOT_MASK] += 1
            if self._kind:
                self._keep(stamp, now_ns, verdict)
        return verdict & ACTION_MASK

    def _keep(self, stamp: int, now_ns: int, verdict: int) -> None:
        first = self._find()
        place = first
        oldest = _U64
        for way in range(_WAYS):
            at = first + way * WORDS
            if self._is_at(at):
                place = at
                break
            age = self._entries[at + 1] if self._entries[at] == stamp else 0
            if age < oldest:
                oldest = age
                place = at
        self._entries[place] = stamp
        self._entries[place + 1] = now_ns + _HOLD
        self._entries[place + 2] = self._kind
        self._entries[place + 3] = self._from_low
        self._entries[place + 4] = self._to_low
        self._entries[place + 5] = self._from_high
        self._entries[place + 6] = self._to_high
        self._entries[place + 7] = verdict

    def _plain(self, size: int) -> int:
        """Where the transport header of a whole TCP or UDP packet without options begins in its frame, else 0.

        Sets the flow; its kind is 0 when the frame is not one to be remembered.
        """
        self._kind = 0
        # What follows counts from the beginning of the room; the frame begins at 14, its IP header at 28.
        room = size - HEADER_BYTES - 14
        ethertype = self._halves[13]
        if ethertype == 0x0008 and room >= 28:
            length = (self._bytes[30] << 8) | self._bytes[31]
            protocol = self._bytes[37]
            if self._bytes[28] != 0x45 or self._halves[17] & 0xFF3F or length > room:
                return 0
            length -= 20
            if protocol == 6:
                header = (self._bytes[60] >> 4) * 4
                if length < 20 or header < 20 or header > length:
                    return 0
            elif protocol == 17:
                header = (self._bytes[52] << 8) | self._bytes[53]
                if header < 8 or header > length:
                    return 0
            else:
                return 0
            ports = self._quads[12]
            low, high = ports & 0xFFFF, ports >> 16
            if self._is_between_us() and not (
                protocol == 17 and (low in (0x4300, 0x4400) or high in (0x4300, 0x4400))
            ):
                self._kind = _KIND4 | (protocol << 32) | ports
                self._from_low = self._quads[10]
                self._to_low = self._quads[11]
                self._from_high = self._to_high = 0
            return 34
        if ethertype == 0xDD86 and room >= 48:
            length = (self._bytes[32] << 8) | self._bytes[33]
            protocol = self._bytes[34]
            if self._bytes[28] >> 4 != 6 or length + 40 > room:
                return 0
            if protocol == 6:
                header = (self._bytes[80] >> 4) * 4
                if length < 20 or header < 20 or header > length:
                    return 0
            elif protocol == 17:
                header = (self._bytes[72] << 8) | self._bytes[73]
                if header < 8 or header > length:
                    return 0
            else:
                return 0
            ports = self._quads[17]
            if self._is_between_us() and not (protocol == 17 and ports & 0xFFFF == 0x2302):
                self._kind = _KIND6 | (protocol << 32) | ports
                self._from_low = self._pair(9)
                self._from_high = self._pair(11)
                self._to_low = self._pair(13)
                self._to_high = self._pair(15)
            return 54
        return 0

    def _pair(self, index: int) -> int:
        """64 bits at an odd multiple of 32."""
        high = self._quads[index + 1]
        high = high << 32
        return self._quads[index] | high

    def _is_between_us(self) -> bool:
        """From our card to another's, or to ours."""
        if self.is_outgoing:
            return (
                self._halves[10] == self._mac0
                and self._halves[11] == self._mac1
                and self._halves[12] == self._mac2
                and not self._bytes[14] & 1
            )
        return (
            self._halves[7] == self._mac0 and self._halves[8] == self._mac1 and self._halves[9] == self._mac2
        )

    def _is_sound_offload(self, transport: int) -> bool:
        """Whether the kernel will only write the checksum of this transport header, and only cut this protocol."""
        kind = self._bytes[3] & ~_GSO_ECN & 0xFF
        if not self._bytes[2] & _NEEDS_CSUM:
            return kind == 0
        protocol = self._bytes[37] if transport == 34 else self._bytes[34]
        where = 16 if protocol == 6 else 6
        if transport == 0 or self._halves[4] != transport or self._halves[5] != where:
            return False
        if kind == 0:
            return True
        return protocol == 6 and kind == (_GSO_TCP4 if transport == 34 else _GSO_TCP6)

    def snapshot(self) -> dict[str, int]:
        return {"remembered": self.remembered, "asked": self.asked, "offload": self.offload}

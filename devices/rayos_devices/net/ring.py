"""The network device's hot loops: frames off the transmit ring and onto the receive ring, with every check in place.

Out: take -> length -> gate -> bucket -> filter -> one send of the guest's own pages -> count -> push. In: take ->
bucket -> one receive into the guest's own pages -> length, gate -> number of buffers -> count -> push; with a filter
into its room, and from there into the guest's pages. In from another ring of this process: length, gate -> bucket ->
take -> headers into the room -> filter -> those and the sender's pages into the guest's -> count -> push. A chain that
is odd (too many pieces, a header in two, a frame over several receive buffers) is left to the general path: the loop
returns with it in hand. The clock is read, and a frame sampled, once a call and every 64th time behind: between them
the bucket sees no time pass.
"""

from __future__ import annotations

from typing import Final, cast

from rayos_devices.bucket import TokenBucket
from rayos_devices.errors import QueueError
from rayos_devices.gate import Denial, Gate, Op
from rayos_devices.native import Buffers, address_of, now_ns, swap
from rayos_devices.net.capture import Capture
from rayos_devices.net.filter import Filter
from rayos_devices.net.outcome import ALLOW, DRY, EMPTY, FAILED, QUIET, SPENT, WAIT
from rayos_devices.net.path import Path
from rayos_devices.net.queue import Inlet
from rayos_devices.net.wire import (
    ETHERNET_HEADER_BYTES,
    GAP_BYTES,
    HEAD_BYTES,
    HEADER_BYTES,
    LEGACY_HEADER_BYTES,
    MAX_FRAME_BYTES,
    NUM_BUFFERS_OFFSET,
    WHOLE_BYTES,
)
from rayos_devices.stats import Stats
from rayos_devices.virtio.vring import Vring

MIN_BYTES: Final = HEADER_BYTES + ETHERNET_HEADER_BYTES
MAX_BYTES: Final = HEADER_BYTES + MAX_FRAME_BYTES
#: Frames after which the driver is told, if it wants.
PUBLISH_EVERY: Final = 16

TX_OP: Final = Op.NET_TX.index
RX_OP: Final = Op.NET_RX.index


class NetRing:
    """One queue's loop over `path`, which may be replaced between two calls. `bucket` shapes; None lets all pass.

    `served` counts the chains of the last call, `size` is the frame that the general path gets with its chain, `inside`
    how much of it the chain has taken; the rest is at `spill`, MAX_BYTES of memory: the room of `filter`, if any.
    """

    def __init__(
        self,
        vring: Vring,
        path: Path,
        stats: Stats,
        gate: Gate,
        bucket: TokenBucket | None,
        spill: int,
        filter: Filter | None = None,
    ) -> None:
        self.vring = vring
        self.path = path
        self.stats = stats
        self._mask = gate.mask
        self.shape(bucket)
        self.filter = cast("Filter", filter)
        self.is_filtered = filter is not None
        self.spill = spill
        self.buffers = Buffers()
        #: Bytes of a port's header that the driver's lacks: they come from, and go to, `_gap_room`.
        self.gap = 0
        self._gap_room = memoryview(bytearray(GAP_BYTES))
        self._gap_address = address_of(self._gap_room)
        self.capture = cast("Capture", None)
        self.is_captured = False
        self.served = 0
        self.size = 0
        self.inside = 0
        self.publish_every = PUBLISH_EVERY
        self._turn = 0
        self._accepted = 0
        # The last look at the clock; and of a sampled frame, when its stages were over.
        self._clock = 0
        self._is_sampled = False
        self._shaped = self._received = self._gated = self._filtered = 0

    def shape(self, bucket: TokenBucket | None) -> None:
        """Shape by this bucket from now on; None lets everything pass."""
        self.bucket = cast("TokenBucket", bucket)
        self.is_shaped = bucket is not None

    def watch(self, capture: Capture | None) -> None:
        """Tell `capture` of the frames that are refused; None: nobody."""
        self.capture = cast("Capture", capture)
        self.is_captured = capture is not None

    def widen(self, data: bytearray) -> None:
        """Give a frame of the driver's the header that ports have."""
        data[NUM_BUFFERS_OFFSET:NUM_BUFFERS_OFFSET] = bytes(self.gap)

    def transmit(self, budget: int) -> int:
        """Send up to `budget` frames and publish; DRY, SPENT, WAIT, or the head of a chain for the general path.

        Errors: QueueError from the vring.
        """
        vring = self.vring
        self.served = 0
        self._clock = now_ns()
        self._is_sampled = True
        while self.served < budget:
            head = self._next()
            if head < 0:
                return head
            self.served += 1
            if not self._send():
                return head
            vring.push(head, 0)
            if self.served % self.publish_every == 0:
                vring.publish()
        vring.publish()
        return SPENT

    def _next(self) -> int:
        """The head of the next chain; or publishes and says why there is none: WAIT, DRY."""
        vring = self.vring
        if self._must_wait():
            vring.publish()
            return WAIT
        while True:
            head = vring.take()
            if head >= 0:
                return head
            vring.publish()
            if not vring.arm():
                return DRY

    def _must_wait(self) -> bool:
        self._turn += 1
        if self._turn & self.stats.sample_mask == 0:
            self._is_sampled = True
            self._clock = now_ns()
        if self.is_shaped and self.bucket.wait(self._clock * 1e-9) > 0.0:
            # Only now it is worth a look at the clock.
            self._clock = now_ns()
            if self.bucket.wait(self._clock * 1e-9) > 0.0:
                return True
        if self._is_sampled:
            self._shaped = now_ns()
        return False

    def _send(self) -> bool:
        vring = self.vring
        size = vring.readable_bytes + self.gap
        if size < MIN_BYTES or size > MAX_BYTES:
            self._drop(Denial.INVALID, size)
            return True
        if not self._mask[0] >> TX_OP & 1:
            self._drop(Denial.CAPABILITY, size)
            return True
        if self._is_sampled:
            self._received = self._shaped
            self._gated = self._filtered = now_ns()
        if vring.readable_count == 1:
            self.buffers.set(vring.addresses[0], vring.lengths[0])
        else:
            self.buffers.clear()
            for index in range(vring.readable_count):
                if not self.buffers.add(vring.addresses[index], vring.lengths[index]):
                    return False
        if self.gap and not self._insert_gap():
            return False
        self.forward(size)
        return True

    def _drop(self, denial: Denial, size: int) -> None:
        """Refuse the frame in the chain, unseen by the filter."""
        vring = self.vring
        self.stats.deny(Op.NET_TX, denial, size)
        if self.is_captured:
            self.buffers.clear()
            for index in range(vring.readable_count):
                if not self.buffers.add(vring.addresses[index], vring.lengths[index]):
                    break
            if self.gap:
                self._insert_gap()
            self.capture.take_denied(self.buffers, self.buffers.total)

    def _insert_gap(self) -> bool:
        self._gap_room[0] = self._gap_room[1] = 0
        return self.buffers.insert(LEGACY_HEADER_BYTES, GAP_BYTES, self._gap_address)

    def forward(self, size: int) -> bool:
        """Send the frame of `size` bytes with header in `buffers`, if the filter lets it pass, and count it."""
        if self.is_filtered and self.filter.check(self.buffers, size, self._clock) != ALLOW:
            self._refuse(TX_OP, size)
            return False
        if self.is_filtered and self._is_sampled:
            self._filtered = now_ns()
        if self.path.send(self.buffers) < 0:
            self.stats.deny(Op.NET_TX, Denial.IO_ERROR, size - HEADER_BYTES)
            return False
        self._count(TX_OP, size - HEADER_BYTES)
        return True

    def _refuse(self, operation: int, size: int) -> None:
        denial = Denial.INVALID if self.filter.is_malformed else Denial.FIREWALL
        self.stats.deny(Op.NET_TX if operation == TX_OP else Op.NET_RX, denial, size - HEADER_BYTES)
        if self.is_captured:
            if operation == TX_OP:
                self.capture.take_denied(self.buffers, size)
            else:  # it was taken when it was received
                self.capture.deny_last()
        if self.is_shaped:  # it cost no less than one that passes
            self.bucket.take(size - HEADER_BYTES)

    def _count(self, operation: int, size: int) -> None:
        self.stats.count(operation, size)
        if self.is_shaped:
            self.bucket.take(size)
        if self._is_sampled:
            self._is_sampled = False
            self._sample(operation, size)

    def _sample(self, operation: int, size: int) -> None:
        now = now_ns()
        self.stats.sample(operation, now - self._clock, size, now)
        received = self._received - self._shaped
        self.stats.profile(
            operation,
            self._gated - self._received,
            self._shaped - self._clock,
            self._filtered - self._gated,
            now - self._filtered + received,
        )
        self._clock = now

    def receive(self, budget: int) -> int:
        """Fills up to `budget` chains and publishes them. Returns DRY without chains, QUIET without frames, WAIT,
        FAILED, SPENT, or the head of a chain for the general path.

        Errors: QueueError from the vring.
        """
        vring = self.vring
        self.served = 0
        self._clock = now_ns()
        self._is_sampled = True
        while self.served < budget:
            head = self._next()
            if head < 0:
                return head
            self._collect()
            size = self.path.receive(self.buffers)
            if size < 0:
                vring.unpop(head)
                vring.publish()
                return QUIET if size == EMPTY else FAILED
            self.served += 1
            if self._is_sampled:
                self._received = self._gated = self._filtered = now_ns()
            if self.is_filtered and not self._admit(size):
                vring.unpop(head)
                continue
            if not self._deliver(head, size):
                return head
            if self.served % self.publish_every == 0:
                vring.publish()
        vring.publish()
        return SPENT

    def _collect(self) -> None:
        """The chain's writable buffers, as many as there is room for, and behind them the spill; or only a room."""
        if self.is_filtered:
            self.buffers.set(self.spill, MAX_BYTES)
            return
        self._open()
        if self.buffers.is_full():
            self.buffers.drop_last()
        self.inside = self.buffers.total
        self.buffers.add(self.spill, MAX_BYTES)

    def _open(self) -> None:
        """The chain's writable buffers, as many as there is room for."""
        vring = self.vring
        first = vring.readable_count
        if vring.count == first + 1:
            self.buffers.set(vring.addresses[first], vring.lengths[first])
        else:
            self.buffers.clear()
            for index in range(first, vring.count):
                if not self.buffers.add(vring.addresses[index], vring.lengths[index]):
                    break
        if self.gap:
            while self.buffers.total > LEGACY_HEADER_BYTES and not self._insert_gap():
                self.buffers.drop_last()

    def _admit(self, size: int) -> bool:
        """Whether the frame in the room may go on, to the guest's pages if they take it whole."""
        self.inside = 0
        if size < MIN_BYTES or not self._mask[0] >> RX_OP & 1:
            return True  # the general path counts it
        if self._is_sampled:
            self._gated = now_ns()
        if self.filter.decide(size, self._clock) != ALLOW:
            self._refuse(RX_OP, size)
            return False
        if self._is_sampled:
            self._filtered = now_ns()
        self._open()
        if size <= self.buffers.total:
            self.inside = self.buffers.scatter(0, size, self.spill)
        return True

    def _deliver(self, head: int, size: int) -> bool:
        vring = self.vring
        self.size = size
        first = vring.readable_count
        if (
            size < MIN_BYTES
            or size > self.inside
            or first == vring.count
            or (vring.lengths[first] < HEADER_BYTES and self.gap == 0)
        ):
            return False
        if not self._mask[0] >> RX_OP & 1:
            return False
        if not self.is_filtered and self._is_sampled:
            self._gated = self._filtered = now_ns()
        self._complete(head, size)
        return True

    def _complete(self, head: int, size: int) -> None:
        """The frame lies in one chain, whose first buffer has its number of buffers, if the driver has such a thing."""
        vring = self.vring
        if self.gap == 0:
            first = vring.readable_count
            region = vring.regions[first]
            at = vring.starts[first] + NUM_BUFFERS_OFFSET
            region.ram[at] = 1
            region.ram[at + 1] = 0
        vring.push(head, size - self.gap)
        self._count(RX_OP, size - HEADER_BYTES)

    def accept(self, buffers: Buffers, is_echo: bool) -> bool:
        """Take a frame from another ring's chain into the next chain here; what is not plain is left to `receive`."""
        vring = self.vring
        size = buffers.total
        if size < MIN_BYTES or size > MAX_BYTES or not self._mask[0] >> RX_OP & 1:
            return False
        if self._accepted == 0:
            self._clock = now_ns()
            self._is_sampled = True
        if self._must_wait():
            return False
        try:
            head = vring.take()
        except QueueError:
            return False  # the vring latched itself, counted and signalled
        if head < 0:
            return False
        self._open()
        first = vring.readable_count
        if self.buffers.total < size or (vring.lengths[first] < HEADER_BYTES and self.gap == 0):
            vring.unpop(head)
            return False
        if self._is_sampled:
            self._received = self._gated = self._filtered = now_ns()
        self._accepted += 1
        if self._pour(buffers, size, is_echo):
            self._complete(head, size)
            if self._accepted % self.publish_every == 0:
                vring.publish()
        else:
            vring.unpop(head)
        return True

    def _pour(self, buffers: Buffers, size: int, is_echo: bool) -> bool:
        """Fill the chain in `self.buffers`, headers by way of the room; False: the filter refused the frame."""
        inside = size if size <= WHOLE_BYTES else HEAD_BYTES
        buffers.gather(0, inside, self.spill)
        if is_echo:
            swap(self.spill + HEADER_BYTES)
        if self.is_filtered:
            verdict = self.filter.recall(size, self._clock)
            if verdict == 0:
                buffers.gather(inside, size - inside, self.spill + inside)
                inside = size
                verdict = self.filter.ask(size, self._clock)
            if verdict != ALLOW:
                self._refuse(RX_OP, size)
                return False
            if self._is_sampled:
                self._filtered = now_ns()
        self.buffers.scatter(0, inside, self.spill)
        if inside < size:
            buffers.transfer(inside, size - inside, self.buffers)
        return True

    def flush(self) -> None:
        """Tell the driver of what was accepted."""
        if self._accepted:
            self._accepted = 0
            self.vring.publish()

    def received(self, size: int) -> None:
        """Count a frame of `size` bytes with header that the general path delivered."""
        self._count(RX_OP, size - HEADER_BYTES)


class RingInlet(Inlet):
    """A receiving ring, to those who send."""

    def __init__(self, ring: NetRing) -> None:
        self.ring = ring

    def accept(self, buffers: Buffers, is_echo: bool) -> bool:
        return self.ring.accept(buffers, is_echo)

    def flush(self) -> None:
        self.ring.flush()

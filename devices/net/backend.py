"""The network device: frames between two queues and a port, shaped by a token bucket each way (VIRTIO 1.3, 5.1).

Queue 0 receives (host to guest), queue 1 transmits. Frames move with one system call each and no copy: the guest's own
buffers go to writev and readv. What the rate does not allow yet waits where it is, in the ring or in the port's
queue, so shaping loses nothing here. A frame that the port or the gate refuses is dropped and counted.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from devices.backend import Backend
from devices.bucket import TokenBucket
from devices.gate import OPEN, Denial, Gate, Op
from devices.loop import Loop
from devices.native import address_of
from devices.net.outcome import DRY, FAILED, QUIET, SPENT, WAIT
from devices.net.port import Port, path_of
from devices.net.ring import NetRing
from devices.net.wire import (
    ETHERNET_HEADER_BYTES,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    NUM_BUFFERS_OFFSET,
    NetFeature,
)
from devices.stats import Stats
from devices.vhost_user.message import ProtocolFeature
from devices.virtio.chain import Chain
from devices.virtio.features import DeviceId

RX: Final = 0
TX: Final = 1

_MIN_BYTES: Final = HEADER_BYTES + ETHERNET_HEADER_BYTES
_MAX_BYTES: Final = HEADER_BYTES + MAX_FRAME_BYTES
#: Seconds of traffic that may pass at once after a pause; never less than one largest frame.
_BURST_SECONDS: Final = 0.01
#: Seconds until a port that failed to deliver (its link is down) is asked again.
_RETRY_SECONDS: Final = 0.5


class NetBackend(Backend):
    """`rate_bytes_per_second` shapes each direction on its own; None is unshaped."""

    device_id = DeviceId.NET
    BUDGET: ClassVar[int] = 256

    def __init__(
        self,
        name: str,
        loop: Loop,
        port: Port,
        *,
        rate_bytes_per_second: float | None = None,
        gate: Gate = OPEN,
    ) -> None:
        super().__init__(name, 2, loop, Stats(Op.NET_TX, Op.NET_RX, Op.NET_CONFIG), gate)
        self.port = port
        self.rate_bytes_per_second = rate_bytes_per_second
        buckets: list[TokenBucket | None] = [None, None]
        if rate_bytes_per_second is not None:
            burst = max(rate_bytes_per_second * _BURST_SECONDS, float(_MAX_BYTES))
            now = loop.now()
            buckets = [TokenBucket(rate_bytes_per_second, burst, now=now) for _ in (RX, TX)]
        spill = bytearray(_MAX_BYTES)
        self._spill = memoryview(spill)
        path = path_of(port)
        self._rings = [
            NetRing(vring, path, self.stats, gate, bucket, address_of(spill))
            for vring, bucket in zip(self.queues, buckets, strict=True)
        ]
        self._timers = [0, 0]
        self._is_listening = False

    @property
    def features(self) -> int:
        return super().features | (
            NetFeature.CSUM
            | NetFeature.GUEST_CSUM
            | NetFeature.MTU
            | NetFeature.GUEST_TSO4
            | NetFeature.GUEST_TSO6
            | NetFeature.HOST_TSO4
            | NetFeature.HOST_TSO6
            | NetFeature.MRG_RXBUF
        )

    @property
    def protocol_features(self) -> ProtocolFeature:
        return (super().protocol_features | ProtocolFeature.MTU) & ~ProtocolFeature.CONFIG

    def set_features(self, features: int) -> None:
        super().set_features(features)
        self.port.set_offload(
            csum=bool(features & NetFeature.GUEST_CSUM),
            tso4=bool(features & NetFeature.GUEST_TSO4),
            tso6=bool(features & NetFeature.GUEST_TSO6),
        )
        self.stats.allow(Op.NET_CONFIG)

    def process(self, queue: int) -> bool:
        if queue == TX:
            return self._transmit()
        # Fresh receive buffers: the port is worth listening to again.
        return self._receive()

    def stop_queue(self, queue: int) -> None:
        if queue == RX:
            self._listen(False)
        if self._timers[queue]:
            self.loop.cancel(self._timers[queue])
            self._timers[queue] = 0
        self._rings[queue].buffers.clear()

    # -- guest to host -------------------------------------------------------------------------------------------

    def _transmit(self) -> bool:
        vring = self.queues[TX]
        ring = self._rings[TX]
        budget = self.BUDGET
        while budget > 0:
            outcome = ring.transmit(budget)
            if outcome == SPENT:
                return True
            if outcome == WAIT:
                self._wait(TX)
                return False
            if outcome == DRY:
                return False
            budget -= ring.served
            # In more pieces than one call takes: by way of memory of ours.
            data = bytearray(vring.chain(outcome).read(vring.readable_bytes))
            ring.buffers.clear()
            ring.buffers.add(address_of(data), len(data))
            ring.sent(ring.path.send(ring.buffers), len(data))
            vring.push(outcome, 0)
        vring.publish()
        return True

    # -- host to guest -------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        ring = self._rings[RX]
        budget = self.BUDGET
        while budget > 0:
            outcome = ring.receive(budget)
            if outcome == QUIET:
                self._listen(True)
                return False
            if outcome == DRY:
                # Without buffers a readable port would wake us for nothing; the next kick listens again.
                self._listen(False)
                return False
            if outcome == WAIT:
                self._listen(False)
                self._wait(RX)
                return False
            if outcome == FAILED:
                self.stats.deny(Op.NET_RX, Denial.IO_ERROR)
                self._listen(False)
                self._call_later(RX, _RETRY_SECONDS)
                return False
            if outcome == SPENT:
                break
            budget -= ring.served
            self._deliver(self.queues[RX].chain(outcome), ring.size, ring.inside)
        self.queues[RX].publish()
        self._listen(True)
        return False

    def _deliver(self, chain: Chain, size: int, inside: int) -> None:
        """Complete `chain`, which holds the first `inside` bytes of a frame of `size` with its header, and as many more
        as the rest needs when the driver merges buffers."""
        vring = self.queues[RX]
        denial = Denial.INVALID if size < _MIN_BYTES else self.gate.check(Op.NET_RX, size - HEADER_BYTES)
        spilled = size - chain.writable_bytes
        more: list[Chain] = []
        chain_errors = vring.chain_errors
        if denial is None and spilled > 0:
            room = 0
            while self.acked_features & NetFeature.MRG_RXBUF and room < spilled:
                extra = vring.pop()
                if extra is None:
                    break
                more.append(extra)
                room += extra.writable_bytes
            if room < spilled:
                denial = Denial.QUEUE_FULL
        if denial is not None or chain.write(b"\0\0", NUM_BUFFERS_OFFSET) != 2:
            if vring.chain_errors == chain_errors:
                for extra in reversed(more):
                    vring.unpop(extra.head)
                vring.unpop(chain.head)
            else:
                # A bad chain between these was answered, so they cannot go back before it: they come back empty.
                for taken in (chain, *more):
                    vring.push(taken.head, 0)
            self.stats.deny(Op.NET_RX, denial or Denial.INVALID)
            return
        done = 0
        if size > inside:
            done = chain.write(self._spill[: size - inside], inside)
        chain.write((1 + len(more)).to_bytes(2, "little"), NUM_BUFFERS_OFFSET)
        vring.push(chain.head, min(size, chain.writable_bytes))
        for extra in more:
            written = extra.write(self._spill[done : min(size - inside, done + extra.writable_bytes)])
            vring.push(extra.head, written)
            done += written
        self._rings[RX].received(size)

    def _listen(self, wanted: bool) -> None:
        if wanted != self._is_listening:
            self._is_listening = wanted
            if wanted:
                self.loop.register(self.port.fileno(), self._readable)
            else:
                self.loop.unregister(self.port.fileno())

    def _readable(self, _events: int) -> None:
        self.run_queue(RX)

    # -- shaping -------------------------------------------------------------------------------------------------

    def _wait(self, queue: int) -> None:
        bucket = self._rings[queue].bucket
        self._call_later(queue, bucket.wait(self.loop.now()))

    def _call_later(self, queue: int, seconds: float) -> None:
        if not self._timers[queue]:
            self._timers[queue] = self.loop.call_at(self.loop.now() + seconds, lambda: self._resume(queue))

    def _resume(self, queue: int) -> None:
        self._timers[queue] = 0
        if self.run_queue(queue):
            self._call_later(queue, 0.0)

    def reset(self) -> None:
        super().reset()
        self._listen(False)

    def snapshot(self) -> dict[str, Any]:
        rate = self.rate_bytes_per_second
        return {**super().snapshot(), "quota": {"rate_bytes_per_second": rate}}

    def close(self) -> None:
        self._listen(False)
        self.port.close()

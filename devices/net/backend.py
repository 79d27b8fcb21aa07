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
from devices.net.port import FramePort
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
    BUDGET: ClassVar[int] = 64

    def __init__(
        self,
        name: str,
        loop: Loop,
        port: FramePort,
        *,
        rate_bytes_per_second: float | None = None,
        gate: Gate = OPEN,
    ) -> None:
        super().__init__(name, 2, loop, Stats(Op.NET_TX, Op.NET_RX, Op.NET_CONFIG), gate)
        self.port = port
        self.rate_bytes_per_second = rate_bytes_per_second
        self._buckets: list[TokenBucket | None] = [None, None]
        if rate_bytes_per_second is not None:
            burst = max(rate_bytes_per_second * _BURST_SECONDS, float(_MAX_BYTES))
            now = loop.now()
            self._buckets = [TokenBucket(rate_bytes_per_second, burst, now=now) for _ in (RX, TX)]
        self._timers = [0, 0]
        self._is_listening = False
        self._spill = memoryview(bytearray(_MAX_BYTES))

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

    # -- guest to host -------------------------------------------------------------------------------------------

    def _transmit(self) -> bool:
        vring = self.queues[TX]
        for _ in range(self.BUDGET):
            if self._must_wait(TX):
                vring.publish()
                return False
            chain = vring.pop()
            if chain is None:
                vring.publish()
                if not vring.arm():
                    return False
                continue
            self._send(chain)
            vring.push(chain.head, 0)
        vring.publish()
        return True

    def _send(self, chain: Chain) -> None:
        size = chain.readable_bytes
        denial: Denial | None
        if not _MIN_BYTES <= size <= _MAX_BYTES:
            denial = Denial.INVALID
        else:
            denial = self.gate.check(Op.NET_TX, size - HEADER_BYTES)
        if denial is None:
            try:
                self.port.send(chain.readable)
            except OSError:
                denial = Denial.IO_ERROR
        if denial is not None:
            self.stats.deny(Op.NET_TX, denial)
            return
        self.stats.allow(Op.NET_TX, size - HEADER_BYTES)
        bucket = self._buckets[TX]
        if bucket is not None:
            bucket.take(size - HEADER_BYTES)

    # -- host to guest -------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        vring = self.queues[RX]
        for _ in range(self.BUDGET):
            if self._must_wait(RX):
                self._listen(False)
                vring.publish()
                return False
            chain = vring.pop()
            if chain is None:
                vring.publish()
                if vring.arm():
                    continue
                # Without buffers a readable port would wake us for nothing; the next kick listens again.
                self._listen(False)
                return False
            try:
                size = self.port.receive([*chain.writable, self._spill])
            except BlockingIOError:
                vring.unpop(chain.head)
                vring.publish()
                self._listen(True)
                return False
            except OSError:
                vring.unpop(chain.head)
                vring.publish()
                self.stats.deny(Op.NET_RX, Denial.IO_ERROR)
                self._listen(False)
                self._call_later(RX, _RETRY_SECONDS)
                return False
            self._deliver(chain, size)
        vring.publish()
        self._listen(True)
        return False

    def _deliver(self, chain: Chain, size: int) -> None:
        """Complete `chain`, and as many more as a mergeable frame of `size` bytes with header needs."""
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
        chain.write((1 + len(more)).to_bytes(2, "little"), NUM_BUFFERS_OFFSET)
        vring.push(chain.head, min(size, chain.writable_bytes))
        done = 0
        for extra in more:
            piece = self._spill[done : min(spilled, done + extra.writable_bytes)]
            extra.write(piece)
            vring.push(extra.head, len(piece))
            done += len(piece)
        self.stats.allow(Op.NET_RX, size - HEADER_BYTES)
        bucket = self._buckets[RX]
        if bucket is not None:
            bucket.take(size - HEADER_BYTES)

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

    def _must_wait(self, queue: int) -> bool:
        bucket = self._buckets[queue]
        if bucket is None:
            return False
        now = self.loop.now()
        wait = bucket.wait(now)
        if wait == 0.0:
            return False
        self._call_later(queue, wait)
        return True

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

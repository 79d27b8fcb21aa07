"""The network device: frames between two queues and a port, shaped by a token bucket each way (VIRTIO 1.3, 5.1).

Queue 2n receives (host to guest), queue 2n + 1 transmits, each pair by a port of its own; the rate is that of all pairs
together. Frames move with one system call each and no copy: the guest's own buffers go to writev and readv; where a
judge is asked (`filter.py`), what it looks at is copied before. What the rate does not allow yet waits where it is, in
the ring or in the port's queue, so shaping loses nothing here. A frame that the port, the gate or the judge refuses is
dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from rayos_devices.backend import Backend
from rayos_devices.bucket import TokenBucket, lower
from rayos_devices.errors import RequestError
from rayos_devices.faults import Faults
from rayos_devices.gate import OPEN, Denial, Gate, Op
from rayos_devices.levels import Level
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.native import address_of
from rayos_devices.net.capture import MAX_SNAP, Capture, CapturePath
from rayos_devices.net.faulty import FaultyPath
from rayos_devices.net.filter import Filter, Judge
from rayos_devices.net.outcome import DRY, FAILED, QUIET, SPENT, WAIT
from rayos_devices.net.port import NetPort, path_of
from rayos_devices.net.ring import NetRing, RingInlet
from rayos_devices.net.wire import (
    ETHERNET_HEADER_BYTES,
    GAP_BYTES,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    NUM_BUFFERS_OFFSET,
    NetFeature,
)
from rayos_devices.stats import Stats
from rayos_devices.vhost_user.message import ProtocolFeature
from rayos_devices.virtio.chain import Chain
from rayos_devices.virtio.features import DeviceId, Feature

RX: Final = 0
TX: Final = 1

_MIN_BYTES: Final = HEADER_BYTES + ETHERNET_HEADER_BYTES
_MAX_BYTES: Final = HEADER_BYTES + MAX_FRAME_BYTES
#: Seconds of traffic that may pass at once after a pause; never less than one largest frame.
_BURST_SECONDS: Final = 0.01
#: Seconds until a port that failed to deliver (its link is down) is asked again.
_RETRY_SECONDS: Final = 0.5

#: Frames after which the driver is told, if it wants: its rings' own, which is a C constant there.
PUBLISH_EVERY: Final = 16


def _burst(rate_bytes_per_second: float) -> float:
    return max(rate_bytes_per_second * _BURST_SECONDS, float(_MAX_BYTES))


class NetBackend(Backend):
    """`ports` has one for each pair of queues. `rate_bytes_per_second` shapes each direction on its own; None is
    unshaped. Without a `judge` all frames pass."""

    device_id = DeviceId.NET
    BUDGET: ClassVar[int] = 256
    SAMPLED = 64
    LIMITS = (Limit.RATE,)

    def __init__(
        self,
        name: str,
        loop: Loop,
        *ports: NetPort,
        rate_bytes_per_second: float | None = None,
        gate: Gate = OPEN,
        judge: Judge | None = None,
    ) -> None:
        super().__init__(name, 2 * len(ports), loop, Stats(Op.NET_TX, Op.NET_RX, Op.NET_CONFIG), gate)
        self.ports = ports
        self.rate_bytes_per_second = rate_bytes_per_second
        self._ceiling = 0.0
        buckets: list[TokenBucket | None] = [None, None]
        if rate_bytes_per_second is not None:
            burst = _burst(rate_bytes_per_second)
            now = loop.now()
            buckets = [TokenBucket(rate_bytes_per_second, burst, now=now) for _ in (RX, TX)]
        self.judge: Judge | None = judge
        self._filters = (
            []
            if judge is None
            else [Filter(judge, is_outgoing=queue % 2 == TX) for queue in range(2 * len(ports))]
        )
        spill = bytearray(0 if judge else _MAX_BYTES)
        self._spills = [one.room for one in self._filters] or [memoryview(spill)] * len(self.queues)
        self._paths = [path_of(port) for port in ports]
        self._rings = [
            NetRing(
                vring,
                self._paths[queue // 2],
                self.stats,
                gate,
                buckets[queue % 2],
                self._filters[queue].address if self._filters else address_of(spill),
                self._filters[queue] if self._filters else None,
            )
            for queue, vring in enumerate(self.queues)
        ]
        self.faults: Faults | None = None
        #: What somebody sees of the frames now.
        self.capture: Capture | None = None
        #: The connection whose end is that of the capture; -1: none.
        self.capturing_reader = -1
        self._route()
        self._timers = [0] * len(self.queues)
        self._listening: set[int] = set()
        self._live: list[int] = []

    def limit_rate(self, bytes_per_second: float) -> None:
        """Whatever the rate is, each direction is no faster than this; 0 is as fast as it allows."""
        self._ceiling = bytes_per_second
        self._shape()

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
            | NetFeature.GUEST_ANNOUNCE
            | (NetFeature.MQ if len(self.ports) > 1 else 0)
        )

    @property
    def queue_num(self) -> int:
        """Pairs: what QEMU's `queues=` must not exceed."""
        return len(self.ports)

    @property
    def protocol_features(self) -> ProtocolFeature:
        return (super().protocol_features | ProtocolFeature.MTU) & ~ProtocolFeature.CONFIG

    def set_features(self, features: int) -> None:
        super().set_features(features)
        self._shape_headers()
        self.ports[0].set_offload(
            csum=bool(features & NetFeature.GUEST_CSUM),
            tso4=bool(features & NetFeature.GUEST_TSO4),
            tso6=bool(features & NetFeature.GUEST_TSO6),
        )
        self.stats.allow(Op.NET_CONFIG)

    def reset_device(self) -> None:
        super().reset_device()
        self._shape_headers()

    def _shape_headers(self) -> None:
        """5.1.6.1: `num_buffers` is there when the driver merges buffers, or is no legacy one."""
        is_whole = self.acked_features & (Feature.VERSION_1 | NetFeature.MRG_RXBUF)
        for ring in self._rings:
            ring.gap = 0 if is_whole else GAP_BYTES

    def process(self, queue: int) -> bool:
        # For the receive queue: fresh buffers, so that the port is worth listening to again.
        if queue % 2 == TX:
            try:
                has_more = self._transmit(queue)
            finally:
                self._rings[queue].path.flush()
        else:
            has_more = self._receive(queue)
        if self.judge is not None and self.judge.answers:
            self._answer(self.judge)
        return has_more

    def start_queue(self, queue: int, *, resumed: bool) -> None:
        if not self._live:
            self.loop.watch(self)
        self._live.append(queue)
        if queue % 2 == RX:
            self.ports[queue // 2].set_enabled(True)

    def stop_queue(self, queue: int) -> None:
        self._live.remove(queue)
        self._set_polled(queue, False)
        if not self._live:
            self.loop.unwatch(self)
        if queue % 2 == RX:
            self._listen(queue, False)
            self.ports[queue // 2].set_enabled(False)
        if self._timers[queue]:
            self.loop.cancel(self._timers[queue])
            self._timers[queue] = 0
        self._rings[queue].buffers.clear()

    # -- guest to host -------------------------------------------------------------------------------------------

    def _transmit(self, queue: int) -> bool:
        vring = self.queues[queue]
        ring = self._rings[queue]
        budget = self.BUDGET
        while budget > 0:
            outcome = ring.transmit(budget)
            if outcome == SPENT:
                return True
            if outcome == WAIT:
                self._wait(queue)
                return False
            if outcome == DRY:
                return False
            budget -= ring.served
            # In more pieces than one call takes: by way of memory of ours.
            data = bytearray(vring.chain(outcome).read(vring.readable_bytes))
            ring.widen(data)
            ring.buffers.clear()
            ring.buffers.add(address_of(data), len(data))
            ring.forward(len(data))
            vring.push(outcome, 0)
        vring.publish()
        return True

    # -- host to guest -------------------------------------------------------------------------------------------

    def _receive(self, queue: int) -> bool:
        ring = self._rings[queue]
        budget = self.BUDGET
        while budget > 0:
            outcome = ring.receive(budget)
            if outcome == QUIET:
                self._listen(queue, True)
                return False
            if outcome == DRY:
                # Without buffers a readable port would wake us for nothing; the next kick listens again.
                self._listen(queue, False)
                return False
            if outcome == WAIT:
                self._listen(queue, False)
                self._wait(queue)
                return False
            if outcome == FAILED:
                self.stats.deny(Op.NET_RX, Denial.IO_ERROR)
                self._listen(queue, False)
                self._call_later(queue, _RETRY_SECONDS)
                return False
            if outcome == SPENT:
                break
            budget -= ring.served
            self._deliver(queue, self.queues[queue].chain(outcome), ring.size, ring.inside)
        self.queues[queue].publish()
        self._listen(queue, True)
        return False

    def _deliver(self, queue: int, chain: Chain, size: int, inside: int) -> None:
        """Completes `chain`, which holds the first `inside` bytes of a frame of `size` with its header. When the
        driver merges buffers, as many more chains are taken as the rest needs.
        """
        vring = self.queues[queue]
        gap = self._rings[queue].gap
        denial = Denial.INVALID if size < _MIN_BYTES else self.gate.check(Op.NET_RX, size - HEADER_BYTES)
        spilled = size - gap - chain.writable_bytes
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
        if denial is not None or (not gap and chain.write(b"\0\0", NUM_BUFFERS_OFFSET) != 2):
            if vring.chain_errors == chain_errors:
                for extra in reversed(more):
                    vring.unpop(extra.head)
                vring.unpop(chain.head)
            else:
                # A bad chain between these was answered, so they cannot go back before it: they come back empty.
                for taken in (chain, *more):
                    vring.push(taken.head, 0)
            self.stats.deny(Op.NET_RX, denial or Denial.INVALID)
            if self.capture is not None:
                self.capture.deny_last()
            return
        done = 0
        if gap:
            rest = bytes(self._spills[queue][: size - inside])
            if inside < HEADER_BYTES:  # its header, too, and the two bytes that this driver's lacks
                chain.write(rest[: NUM_BUFFERS_OFFSET - inside], inside)
                rest = rest[HEADER_BYTES - inside :]
                inside = HEADER_BYTES
            chain.write(rest, inside - gap)
            vring.push(chain.head, size - gap)
            self._rings[queue].received(size)
            return
        if size > inside:
            done = chain.write(self._spills[queue][: size - inside], inside)
        chain.write((1 + len(more)).to_bytes(2, "little"), NUM_BUFFERS_OFFSET)
        vring.push(chain.head, min(size, chain.writable_bytes))
        for extra in more:
            written = extra.write(self._spills[queue][done : min(size - inside, done + extra.writable_bytes)])
            vring.push(extra.head, written)
            done += written
        self._rings[queue].received(size)

    def _listen(self, queue: int, wanted: bool) -> None:
        if wanted != (queue in self._listening):
            fd = self.ports[queue // 2].fileno()
            if wanted:
                self._listening.add(queue)
                self.loop.register(fd, lambda _events: self._readable(queue))
            else:
                self._listening.discard(queue)
                self.loop.unregister(fd)

    def _readable(self, queue: int) -> None:
        self.run_queue(queue)

    # -- refused with an answer ----------------------------------------------------------------------------------

    def _answer(self, judge: Judge) -> None:
        """Deliver what the judge says to the senders of refused frames; without room it is lost, as on a wire."""
        while judge.answers:
            is_to_guest, frame = judge.answers.popleft()
            data = bytearray(HEADER_BYTES + len(frame))
            data[HEADER_BYTES:] = frame
            if not is_to_guest:
                ring = self._rings[TX]
                ring.buffers.clear()
                ring.buffers.add(address_of(data), len(data))
                ring.path.send(ring.buffers)
                ring.path.flush()
            elif self.queues[RX].attached and (chain := self.queues[RX].pop()) is not None:
                self._spills[RX][: len(data)] = data
                self._deliver(RX, chain, len(data), 0)
                self.queues[RX].publish()

    # -- watched by somebody ------------------------------------------------------------------------------------

    def forget_reader(self, reader: int) -> None:
        if reader == self.capturing_reader:
            self.capturing_reader = -1
            self.stop_capture()

    def apply_ceilings(self, ceilings: Mapping[str, int]) -> None:
        self.limit_rate(float(ceilings["net_rate"]))

    def start_capture(self, snap: int, on_record: Callable[[], None]) -> Capture:
        """Copy `snap` bytes of each frame from now on; `on_record` as in `Capture`.

        Errors: RequestError while another capture runs, or for a `snap` that is out of range.
        """
        if self.capture is not None:
            raise RequestError(f"{self.name} is being captured already")
        if not 1 <= snap <= MAX_SNAP:
            raise RequestError(f"a snap length of {snap} bytes: 1 to {MAX_SNAP} are allowed")
        self.capture = Capture(snap, on_record)
        self._route()
        return self.capture

    def stop_capture(self) -> None:
        """Copy nothing any more: the rings have the port's own path again."""
        if self.capture is not None:
            self.capture = None
            self._route()

    def _route(self) -> None:
        """The rings' paths: the port's own, behind the faults and whoever watches."""
        for queue, ring in enumerate(self._rings):
            path = self._paths[queue // 2]
            path.set_awake(False)  # what stands before it may not pass that on
            if self.faults is not None:
                path = FaultyPath(path, self.faults, self.loop, self.stats)
            ring.watch(self.capture)
            ring.path = path if self.capture is None else CapturePath(path, self.capture)
            if queue % 2 == RX:  # whoever stands before the path sees what is received from it
                own = self._paths[queue // 2]
                own.set_inlet(RingInlet(ring) if ring.path is own else None)

    # -- looked at instead of woken (rayos_devices.loop.Watched) -------------------------------------------------------

    def poll(self) -> bool:
        has_found = False
        for queue in tuple(self._live):
            if self._has_work(queue):
                has_found = True
                self.run_queue(queue)
        return has_found

    def set_awake(self, awake: bool) -> bool:
        for queue in self._live:
            self._set_polled(queue, awake)
        return any(map(self._has_work, self._live))

    def _has_work(self, queue: int) -> bool:
        if self._timers[queue] or not self.queues[queue].is_waiting():
            return False
        # Receive buffers are work when a frame waits; without them the port was not listened to.
        return queue % 2 == TX or self._rings[queue].path.has_frame() or queue not in self._listening

    def _set_polled(self, queue: int, polled: bool) -> None:
        self.queues[queue].is_polled = polled
        if not polled:
            self.queues[queue].arm()
        if queue % 2 == RX:
            self._rings[queue].path.set_awake(polled)

    # -- shaping -------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Queues that wait for their rate."""
        return sum(map(bool, self._timers))

    def limit(self, limit: Limit) -> int:
        return round(self.rate_bytes_per_second or 0)

    def apply_limit(self, limit: Limit, value: int) -> None:
        self.set_rate(float(value) or None)

    def set_rate(self, rate_bytes_per_second: float | None) -> None:
        """Shape each direction at another rate from now on; None is unshaped."""
        self.rate_bytes_per_second = rate_bytes_per_second
        self._shape()

    def _rate(self) -> float:
        return lower(self.rate_bytes_per_second or 0.0, self._ceiling)

    def _shape(self) -> None:
        now = self.loop.now()
        rate = self._rate()
        for direction in (RX, TX):
            rings = self._rings[direction::2]
            bucket: TokenBucket | None = None
            if rate and rings[0].is_shaped:
                bucket = rings[0].bucket
                bucket.set_rate(rate, _burst(rate), now=now)
            elif rate:
                bucket = TokenBucket(rate, _burst(rate), now=now)
            for ring in rings:
                ring.shape(bucket)
        for queue, timer in enumerate(self._timers):
            if timer:  # it may go on sooner, or wait again
                self.loop.cancel(timer)
                self._timers[queue] = 0
                self._call_later(queue, 0.0)

    def set_level(self, level: int) -> None:
        super().set_level(level)
        for ring in self._rings:
            ring.publish_every = PUBLISH_EVERY if level >= Level.BATCHING else 1
        for one in self._filters:
            one.is_remembering = level >= Level.REMEMBERING

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
        self._ignore_all()

    def _ignore_all(self) -> None:
        for queue in tuple(self._listening):
            self._listen(queue, False)

    def set_faults(self, faults: Faults | None) -> None:
        """From now on frames are lost or late as `faults` says (ops tx and rx); None: no more."""
        self.faults = faults
        self._route()

    def snapshot(self) -> dict[str, Any]:
        found = {**super().snapshot(), "quota": {"rate_bytes_per_second": self._rate() or None}}
        if self.judge is not None:
            cache = [one.snapshot() for one in self._filters]
            found["firewall"] = {
                **self.judge.snapshot(),
                "cache": {key: sum(one[key] for one in cache) for key in cache[0]},
            }
        return found

    def close(self) -> None:
        self._ignore_all()
        for port in self.ports:
            port.close()

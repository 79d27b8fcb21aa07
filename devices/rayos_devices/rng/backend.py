"""The entropy device: each buffer of the guest is filled with the host kernel's random bytes (VIRTIO 1.3, 5.4).

A request travels: kick -> `process` -> rate -> gate -> getrandom(2) -> the guest's buffer -> used ring. A request that
may not be answered now stays in its ring, since a device must never answer with nothing (5.4.6.2).

Nothing is kept beside the ring: a successor answers what its predecessor had not published, with other bytes.
"""

from __future__ import annotations

import os
from typing import ClassVar, Final

from rayos_devices.backend import Backend
from rayos_devices.bucket import BURST_SECONDS, TokenBucket
from rayos_devices.errors import ConfigurationError
from rayos_devices.gate import OPEN, Denial, Gate, Op
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.native import now_ns
from rayos_devices.stats import Stats
from rayos_devices.virtio.chain import Chain

#: VIRTIO 1.3, 5: entropy source.
VIRTIO_ID: Final = 4
REQUEST_QUEUE: Final = 0
#: Bytes of one answer: a buffer may be larger, and the driver asks again. The kernel makes them in some 10 us.
MAX_REQUEST_BYTES: Final = 4096
#: Seconds until a request is tried again that the gate refused, or that came before the host's kernel had entropy.
RETRY_SECONDS: Final = 1.0


class RngBackend(Backend):
    """Answers at most `rate_bytes_per_second`; None is unbounded."""

    device_id = VIRTIO_ID
    BUDGET: ClassVar[int] = 32
    LIMITS = (Limit.RATE,)

    def __init__(
        self, name: str, loop: Loop, *, rate_bytes_per_second: float | None = None, gate: Gate = OPEN
    ) -> None:
        """Errors: ConfigurationError for a negative rate."""
        rate = round(rate_bytes_per_second or 0)
        if rate < 0:
            raise ConfigurationError(f"a rate of {rate} bytes a second: 0 (unbounded) or more is allowed")
        super().__init__(name, 1, loop, Stats(Op.RNG_READ), gate)
        self._rate = 0
        self._bucket: TokenBucket | None = None
        self._timer = 0
        self._set_rate(rate)

    # -- limits --------------------------------------------------------------------------------------------------

    def limit(self, limit: Limit) -> int:
        return self._rate

    def apply_limit(self, limit: Limit, value: int) -> None:
        self._set_rate(value)
        self._go_on()

    def _set_rate(self, rate: int) -> None:
        self._rate = rate
        burst = max(rate * BURST_SECONDS, float(MAX_REQUEST_BYTES))
        self._bucket = TokenBucket(rate, burst, now=self.loop.now()) if rate else None

    # -- the guest's side ----------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        return 1 if self._timer else 0

    def process(self, queue: int) -> bool:
        vring = self.queues[queue]
        try:
            for _ in range(self.BUDGET):
                if self._must_wait():
                    return False
                chain = vring.pop()
                if chain is None:
                    vring.publish()
                    if not vring.arm():
                        return False
                elif not self._answer(chain):
                    vring.unpop(chain.head)
                    return False
            return True
        finally:
            vring.publish()

    def _answer(self, chain: Chain) -> bool:
        """Fills a buffer; False when it has to wait."""
        vring = self.queues[REQUEST_QUEUE]
        size = min(chain.writable_bytes, MAX_REQUEST_BYTES)
        if not size:
            vring.chain_errors += 1
            vring.push(chain.head, 0)
            return True
        started = now_ns()
        denial = self.gate.check(Op.RNG_READ, size)
        try:
            data = b"" if denial else os.getrandom(size, os.GRND_NONBLOCK)
        except BlockingIOError:
            denial = Denial.IO_ERROR
        if denial is not None:
            self.stats.deny(Op.RNG_READ, denial, size, started)
            self._wait(RETRY_SECONDS)
            return False
        vring.push(chain.head, chain.write(data))
        if self._bucket is not None:
            self._bucket.take(size)
        self.stats.allow(Op.RNG_READ, size, started)
        return True

    def _must_wait(self) -> bool:
        if self._timer:
            return True
        seconds = 0.0 if self._bucket is None else self._bucket.wait(self.loop.now())
        if seconds > 0.0:
            self._wait(seconds)
        return seconds > 0.0

    def _wait(self, seconds: float) -> None:
        self._timer = self.loop.call_at(self.loop.now() + seconds, self._go_on)

    def _go_on(self) -> None:
        if self._timer:
            self.loop.cancel(self._timer)
            self._timer = 0
        if self.run_queue(REQUEST_QUEUE):
            self.loop.call_soon(self._go_on)

    def stop_queue(self, queue: int) -> None:
        if self._timer:
            self.loop.cancel(self._timer)
            self._timer = 0

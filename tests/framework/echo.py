"""The smallest device: what is readable comes back in what is writable; for tests of what all devices share."""

from __future__ import annotations

from collections import deque
from typing import ClassVar

from rayos_devices.backend import Backend
from rayos_devices.gate import Op
from rayos_devices.loop import Loop
from rayos_devices.stats import Stats
from rayos_devices.virtio.chain import Chain


class EchoBackend(Backend):
    """With `is_slow`, chains stay in flight until `complete`."""

    device_id = 63
    BUDGET: ClassVar[int] = 32

    def __init__(self, loop: Loop, queues: int = 2, *, is_slow: bool = False) -> None:
        super().__init__("echo", queues, loop, Stats(Op.CONSOLE_READ))
        self.is_slow = is_slow
        self.held: deque[tuple[int, Chain]] = deque()
        self.config = bytearray(b"echo config space")
        self.started: list[tuple[int, bool]] = []
        self.stopped: list[int] = []

    def config_space(self) -> bytes:
        return bytes(self.config)

    def write_config(self, offset: int, data: bytes) -> None:
        room = max(0, len(self.config) - offset)
        self.config[offset : offset + min(room, len(data))] = data[:room]

    def process(self, queue: int) -> bool:
        vring = self.queues[queue]
        for _ in range(self.BUDGET):
            chain = vring.pop()
            if chain is None:
                vring.publish()
                if not vring.arm():
                    return False
                continue
            self.held.append((queue, chain))
            if not self.is_slow:
                self.complete(1)
        vring.publish()
        return True

    def complete(self, count: int | None = None) -> None:
        """Finish the oldest `count` chains in flight (all) and, when slow, publish them."""
        for _ in range(len(self.held) if count is None else count):
            queue, chain = self.held.popleft()
            self.queues[queue].push(chain.head, chain.write(chain.read(chain.readable_bytes)))
            if self.is_slow:
                self.queues[queue].publish()

    def start_queue(self, queue: int, *, resumed: bool) -> None:
        self.started.append((queue, resumed))

    def stop_queue(self, queue: int) -> None:
        """Gives requests in flight back to the ring, newest first: the successor sees them again."""
        self.stopped.append(queue)
        kept: deque[tuple[int, Chain]] = deque()
        while self.held:
            owner, chain = self.held.pop()
            if owner == queue:
                self.queues[queue].unpop(chain.head)
            else:
                kept.appendleft((owner, chain))
        self.held = kept

"""A backend whose state outlives its worker: when to save it, and what a successor does first.

The rules of `rayos_devices.state` in one place. Theory of operation: everything a chain changes is saved by `settle`,
in the order save, publish, commit; everything the host changes is saved at once. A worker that was killed between
save and publish leaves a state of which only the ring can tell whether it is true, and the ring is known only once
the frontend's queue is live again. Until then the successor shows the state before, handles no chain and puts host
operations off.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from rayos_devices.backend import Backend
from rayos_devices.errors import QueueError
from rayos_devices.gate import OPEN, Gate
from rayos_devices.loop import Loop
from rayos_devices.state import StateStore
from rayos_devices.stats import Stats
from rayos_devices.virtio.chain import Chain


class DurableBackend(Backend):
    """The base class of backends whose state outlives their worker. Subclasses call `restore` at the end of their
    construction, set `is_dirty` with every change of their state, and `settle` a queue before their `process` returns
    or raises.
    """

    def __init__(
        self,
        name: str,
        queue_count: int,
        loop: Loop,
        stats: Stats,
        gate: Gate = OPEN,
        *,
        store: StateStore,
    ) -> None:
        super().__init__(name, queue_count, loop, stats, gate)
        self.is_dirty = False
        self._store = store
        self._undecided = -1
        self._deferred: list[Callable[[], object]] = []
        self._is_fresh = True
        self._scheduled: set[int] = set()

    @abstractmethod
    def pack_state(self) -> bytes:
        """The whole state, at most the store's capacity."""

    @abstractmethod
    def unpack_state(self, payload: bytes) -> None:
        """Become what `pack_state` of a predecessor told."""

    @abstractmethod
    def forget_driver(self) -> None:
        """Drop what one driver told: another begins. What the host asked for stays."""

    # -- taking over ---------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Take up the predecessor's state, as far as it is known before its queues are live."""

        def ask_later(queue: int, _used_index: int) -> bool:
            self._undecided = queue
            return False

        self._load(ask_later)

    def _load(self, is_published: Callable[[int, int], bool]) -> None:
        payload = self._store.load(is_published)
        if payload is not None:
            self.unpack_state(payload)

    @property
    def is_undecided(self) -> bool:
        """The ring has not told yet which of two states is true."""
        return self._undecided >= 0

    def start_queue(self, queue: int, *, resumed: bool) -> None:
        super().start_queue(queue, resumed=resumed)
        is_first, self._is_fresh = self._is_fresh, False
        if not resumed:
            self._decide()
            if is_first:
                self._forget()
        elif queue == self._undecided:
            self._load(lambda index, used: self.queues[index].used_index == used)
            self._decide()

    def _decide(self) -> None:
        if self._undecided < 0:
            return
        self._undecided = -1
        deferred, self._deferred = self._deferred, []
        for operation in deferred:
            operation()
        for queue in self.queues:
            if queue.attached:
                self.run_soon(queue.index)
        self.ready_again()

    def ready_again(self) -> None:
        """Tells the host's side that requests refused while the state was undecided may be repeated."""

    def defer(self, operation: Callable[[], object]) -> None:
        """Do a host's operation as soon as the state is decided: a handful of messages later."""
        self._deferred.append(operation)

    def reset_device(self) -> None:
        super().reset_device()
        self._undecided = -1
        self._deferred.clear()
        self._scheduled.clear()
        self._forget()

    def _forget(self) -> None:
        self.forget_driver()
        self.save()

    # -- working -------------------------------------------------------------------------------------------------

    def run_queue(self, queue: int) -> bool:
        return False if self.is_undecided else super().run_queue(queue)

    def run_soon(self, queue: int) -> None:
        """Have a queue processed in the loop's next round, and again until nothing is left."""
        if queue not in self._scheduled:
            self._scheduled.add(queue)
            self.loop.call_soon(lambda: self._run_scheduled(queue))

    def _run_scheduled(self, queue: int) -> None:
        if queue in self._scheduled:
            self._scheduled.discard(queue)
            if self.run_queue(queue):
                self.run_soon(queue)

    def pop(self, queue: int) -> Chain | None:
        """The queue's next chain; a queue that its driver broke is committed before QueueError goes on its way."""
        try:
            return self.queues[queue].pop()
        except QueueError:
            self.commit(queue)
            raise

    def drain(
        self, queue: int, handle: Callable[[Chain], int | None], has_work: Callable[[], bool] = lambda: True
    ) -> bool:
        """Hand the queue's chains to `handle` while it `has_work`, at most BUDGET, and commit: all that `process` does.

        `handle` returns the bytes that it wrote; None puts the chain back and ends the turn.
        """
        vring = self.queues[queue]
        for _ in range(self.BUDGET):
            if not has_work():
                self.commit(queue)
                return False
            chain = self.pop(queue)
            if chain is None:
                self.commit(queue)
                if not vring.arm():
                    return False
                continue
            written = handle(chain)
            if written is None:
                vring.unpop(chain.head)
                break
            vring.push(chain.head, written)
        self.commit(queue)
        return True

    def commit(self, queue: int) -> None:
        """Publish what was pushed; with it, and not before, the changed state becomes true."""
        vring = self.queues[queue]
        if not self.is_dirty:
            vring.publish()
        elif vring.next_used_index == vring.used_index:
            self.save()
        else:
            self.is_dirty = False
            self._store.save(self.pack_state(), queue, vring.next_used_index)
            vring.publish()
            self._store.commit()

    def save(self) -> None:
        """Save a change that no chain brought; it is true at once."""
        self.is_dirty = False
        self._store.save(self.pack_state())

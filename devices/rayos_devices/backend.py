"""The base class of the backends: a virtio device model as the vhost-user session sees it.

A backend owns its queues' processing and nothing of the protocol. The session calls it on the loop's thread:
``start_queue`` when a queue is live, ``process`` when it was kicked (or may have work), ``stop_queue`` before guest
memory goes away. A new device goes into a folder of its own beside the five, with `wire.py` and `backend.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from rayos_devices.errors import QueueError, RequestError
from rayos_devices.gate import OPEN, Gate
from rayos_devices.limits import MAXIMUM, Limit
from rayos_devices.loop import Loop
from rayos_devices.stats import SAMPLED, Stats
from rayos_devices.vhost_user.message import ProtocolFeature
from rayos_devices.virtio.features import TRANSPORT_FEATURES, Feature, Status
from rayos_devices.virtio.vring import Vring


class Backend(ABC):
    """A device model.

    `name` is unique in its VM; `queues` are the vrings, made at construction and reused for every session.
    """

    device_id: ClassVar[int]
    #: Chains one call of `process` may take before the others get a turn.
    BUDGET: ClassVar[int] = 256
    #: A power of two: one in so many operations in a row is timed.
    SAMPLED: ClassVar[int] = SAMPLED
    #: What may be changed while it runs.
    LIMITS: ClassVar[tuple[Limit, ...]] = ()
    #: What a ceiling leaves of them at least.
    LEAST: ClassVar[int] = 1
    #: Who decides about each of its frames, of a device that has any.
    judge: object | None = None

    def __init__(self, name: str, queue_count: int, loop: Loop, stats: Stats, gate: Gate = OPEN) -> None:
        self.name = name
        self.loop = loop
        self.stats = stats
        stats.sample_mask = self.SAMPLED - 1
        self.gate = gate
        self.queues = [Vring(index) for index in range(queue_count)]
        self.acked_features = 0
        self._offers_packed = False
        #: The driver's device status (VIRTIO 1.3, 2.1), where the frontend tells it.
        self.status = 0
        #: Tells the frontend to read the configuration again, where it listens to that.
        self.on_config_change: Callable[[], None] | None = None
        self._owes_config_change = False
        self._wanted: dict[Limit, int] = {}
        self._ceilings: dict[Limit, int] = {}

    @property
    def features(self) -> int:
        """The feature bits offered; subclasses add their own to these."""
        return TRANSPORT_FEATURES | (Feature.RING_PACKED if self._offers_packed else 0)

    def offer_packed(self, journals: Sequence[memoryview]) -> None:
        """Offer packed rings, whose positions outlive this process in a journal for each queue; none: do not."""
        self._offers_packed = bool(journals)
        for vring, journal in zip(self.queues, journals, strict=False):
            vring.journal = journal

    @property
    def protocol_features(self) -> ProtocolFeature:
        return (
            ProtocolFeature.MQ
            | ProtocolFeature.LOG_SHMFD
            | ProtocolFeature.REPLY_ACK
            | ProtocolFeature.BACKEND_REQ
            | ProtocolFeature.CONFIG
            | ProtocolFeature.RESET_DEVICE
            | ProtocolFeature.CONFIGURE_MEM_SLOTS
            | ProtocolFeature.STATUS
        )

    @property
    def queue_num(self) -> int:
        """The answer to GET_QUEUE_NUM."""
        return len(self.queues)

    def config_space(self) -> bytes:
        """The device's configuration space (VIRTIO 1.3, 5.x.4); reads beyond its end are zeros."""
        return b""

    def start_session(self, *, resumed: bool) -> None:
        """A frontend is there. `resumed`: it is the one that a killed predecessor served."""

    def is_new_write(self, number: int) -> bool:
        """Returns False when a predecessor did the session's `number`-th write of the configuration. After a crash in
        the middle of a write it is told again, and a device that cannot do it twice has to know.
        """
        return True

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote `data` at `offset`; fields that are not the driver's to write are ignored."""

    @abstractmethod
    def process(self, queue: int) -> bool:
        """Handle what the queue holds, at most BUDGET chains; True when more is left.

        Must publish before it returns. Errors: QueueError after the vring latched itself.
        """

    def run_queue(self, queue: int) -> bool:
        """`process` a live queue from any event source; False also when its driver broke it."""
        if not self.queues[queue].attached:
            return False
        try:
            return self.process(queue)
        except QueueError:
            return False  # the vring latched itself, counted and signalled; nothing is parsed until it is stopped

    def start_queue(self, queue: int, *, resumed: bool) -> None:
        """The queue is live. `resumed`: a predecessor was killed while it served it."""

    def stop_queue(self, queue: int) -> None:
        """The queue stops after this returns: nothing may touch its chains any more."""

    def set_features(self, features: int) -> None:
        """The driver's choice, masked to what was offered."""
        self.acked_features = features

    def take_gpu_socket(self, fd: int) -> bool:
        """GPU_SET_SOCKET: True when the descriptor was taken over (the GPU does)."""
        return False

    def reset_device(self) -> None:
        """The driver reset the device, its queues are stopped: forget what it set up."""
        self.acked_features = 0

    def reset(self) -> None:
        """The frontend left: forget what it and the driver set up."""
        self.status = 0
        self.reset_device()

    def tell_config_change(self) -> None:
        """The configuration space has changed: the frontend reads it again and tells the driver."""
        if self.on_config_change is not None:
            self.on_config_change()
        else:
            self._owes_config_change = True

    def set_config_listener(self, listener: Callable[[], None] | None) -> None:
        """Whom `tell_config_change` calls from now on; at once, when something has changed while nobody listened."""
        self.on_config_change = listener
        if listener is not None and self._owes_config_change:
            self._owes_config_change = False
            listener()

    # -- the host's side -----------------------------------------------------------------------------------------

    def listen(self, on_news: Callable[[], None]) -> None:
        """Whom to call when a host's request that had to wait may be repeated, or something can be read."""

    def forget_reader(self, reader: int) -> None:
        """A connection of the host's side that read here is gone."""

    def listen_fullness(self, on_full: Callable[[str], None]) -> None:
        """Whom to call with "quota" or "host" for each write that was refused for want of room."""

    @property
    def storage(self) -> tuple[int, int | None]:
        """Bytes of the host's storage that it takes, and that it may take; None is unbounded."""
        return 0, None

    def apply_ceilings(self, ceilings: Mapping[str, int]) -> None:
        """Whatever its limits are, no more than this from now on; each device takes those that are its own, 0 is none.

        By name: net_rate and disk_rate in bytes a second, disk_size and gpu_memory in bytes, input_queue in events,
        disk_at_once in requests.
        """

    # -- accounting ----------------------------------------------------------------------------------------------

    def use_account(self, page: memoryview) -> None:
        """Count into shared memory of ACCOUNT_BYTES, go on from what a predecessor counted, with the limits it had."""
        self.stats.move(page, self.name)
        account = self.stats.account
        for limit in self.LIMITS:
            value = account.limit(limit.index)
            if value is not None:
                self._set_limit(limit, value)

    @property
    def depth(self) -> int:
        """Requests on their way, or events that wait for the guest."""
        return 0

    def limit(self, limit: Limit) -> int:
        """One of LIMITS as it is now; 0 is unbounded."""
        raise NotImplementedError

    def apply_limit(self, limit: Limit, value: int) -> None:
        """Change one of LIMITS. Errors: RequestError when this device cannot have that value."""
        raise NotImplementedError

    def change_limit(self, limit: Limit, value: int) -> None:
        """Change a limit at once, and for successors. Errors: RequestError."""
        if limit not in self.LIMITS:
            known = ", ".join(one.value for one in self.LIMITS) or "none"
            raise RequestError(f"{self.name} has no limit {limit.value}: it has {known}")
        if not 0 <= value <= MAXIMUM:
            raise RequestError(f"a limit of {value}: 0 to {MAXIMUM} are allowed")
        self._set_limit(limit, value)
        self.stats.set_limit(limit.index, value)

    def _set_limit(self, limit: Limit, value: int) -> None:
        self.apply_limit(limit, value)
        self._wanted[limit] = value
        if self._ceilings.get(limit):
            self.cap_limit(limit, self._ceilings[limit])

    def cap_limit(self, limit: Limit, ceiling: int) -> None:
        """Whatever one of LIMITS is set to, now or later, no more than `ceiling` from now on; 0: what it is set to."""
        wanted = self._wanted.setdefault(limit, self.limit(limit))
        self._ceilings[limit] = ceiling
        self.apply_limit(limit, min(wanted or ceiling, max(ceiling, self.LEAST) if ceiling else wanted))

    def set_level(self, level: int) -> None:
        """How much is done to be fast (`levels.py`)."""
        self.stats.sample_mask = self.SAMPLED - 1 if level else 0

    def snapshot(self) -> dict[str, Any]:
        """Counters, JSON-ready."""
        return {
            "status": [str(bit.name).lower() for bit in Status if bit & self.status],
            "queues": [
                {
                    "size": queue.size,
                    "requests": queue.requests,
                    "kicks": queue.kicks,
                    "calls": queue.calls,
                    "chain_errors": queue.chain_errors,
                    "broken": queue.broken,
                }
                for queue in self.queues
            ],
            **self.stats.snapshot(),
            "depth": self.depth,
            "limits": {limit.value: self.limit(limit) for limit in self.LIMITS},
        }

    def finish(self) -> None:
        """Return when all that was taken from the rings is over and told: another process goes on with the queues."""

    def close(self) -> None:
        """Let go of descriptors; the backend is not used again."""

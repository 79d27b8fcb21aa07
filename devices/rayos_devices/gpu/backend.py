"""The GPU: its two queues, and the state that outlives its worker (VIRTIO 1.3, 5.7.6).

A guest's frame travels: TRANSFER_TO_HOST_2D -> `Commands` -> gate -> `ResourceTable.transfer` (guest pages into the
heap), then RESOURCE_FLUSH -> `Screen.flush` -> `Display` (QEMU's consoles) and `DamageLog` (our own viewers, `frame`).

Crash-exact: a command that changes what exists is saved, published and committed before the next one is begun
(devices/rayos_devices/state.py), and what it dropped is freed only after that. The pixels are in the heap's memfd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from rayos_devices.backend import Backend
from rayos_devices.errors import ConfigurationError, QueueError, RequestError
from rayos_devices.gate import OPEN, Gate, Op
from rayos_devices.gpu import saved
from rayos_devices.gpu.commands import CONTROL, Commands
from rayos_devices.gpu.edid import MAX_MODES, MAX_SIDE
from rayos_devices.gpu.heap import PAGE_BYTES, Heap
from rayos_devices.gpu.resource import ResourceTable
from rayos_devices.gpu.scanout import Cursor, ScanoutFrame
from rayos_devices.gpu.screen import Screen
from rayos_devices.gpu.wire import CONFIG, MAX_SCANOUTS, GpuFeature
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.state import StateStore
from rayos_devices.stats import Stats
from rayos_devices.virtio.features import DeviceId

#: Of pixels and backing lists, unless the machine asks for another.
DEFAULT_QUOTA_BYTES: Final = 128 << 20
#: Bytes copied in one turn, before other devices have theirs: about 10 ms.
_TURN_BYTES: Final = 32 << 20


class _NotAttachedError(Exception):
    """The saved state depends on a queue whose used index is not to be seen yet."""


class GpuBackend(Backend):
    """A 2D GPU with `scanouts` monitors of `width` by `height` pixels, which can do `modes` as well.

    All resources and backings together take at most `quota_bytes` of host memory (whole pages), which lie in `heap_fd`
    (a memfd that stays the caller's; None: private). `state` and `heap_fd` of a killed predecessor make a successor.
    """

    device_id = DeviceId.GPU
    #: The render queue's depth.
    BUDGET: ClassVar[int] = 32
    #: What the StateStore must have room for.
    STATE_BYTES: ClassVar[int] = saved.STATE_BYTES

    def __init__(
        self,
        name: str,
        loop: Loop,
        *,
        width: int = 1280,
        height: int = 800,
        scanouts: int = 1,
        modes: Sequence[tuple[int, int]] = (),
        quota_bytes: int = DEFAULT_QUOTA_BYTES,
        heap_fd: int | None = None,
        state: StateStore | None = None,
        gate: Gate = OPEN,
    ) -> None:
        """Errors: ConfigurationError for a mode, scanout count or quota that is impossible."""
        stats = Stats(Op.GPU_ALLOC, Op.GPU_FREE, Op.GPU_RENDER, Op.GPU_READBACK)
        super().__init__(name, 2, loop, stats, gate)
        try:
            for mode in ((width, height), *modes):
                _check_mode(*mode)
        except RequestError as error:
            raise ConfigurationError(str(error)) from None
        if len(modes) > MAX_MODES:
            raise ConfigurationError(f"{len(modes)} more modes: at most {MAX_MODES} are allowed")
        if not 1 <= scanouts <= MAX_SCANOUTS:
            raise ConfigurationError(f"{scanouts} scanouts: 1 to {MAX_SCANOUTS} are allowed")
        if quota_bytes <= 0 or quota_bytes % PAGE_BYTES:
            raise ConfigurationError(
                f"a GPU quota of {quota_bytes} bytes: a positive multiple of {PAGE_BYTES} is allowed"
            )
        if state is not None and state.capacity_bytes < self.STATE_BYTES:
            raise ConfigurationError(
                f"a state store of {state.capacity_bytes} bytes: the GPU needs {self.STATE_BYTES}"
            )
        self.heap = Heap(heap_fd, quota_bytes)
        self.screen = Screen(loop, self.heap.view, scanouts, width, height, stats, gate)
        self._table = ResourceTable(self.heap)
        self._commands = Commands(self.screen, self._table, self.queues[CONTROL], stats, gate, modes)
        self._state = state or StateStore(None, self.STATE_BYTES)
        self._is_loaded = self._load()

    # -- what the session sees -----------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        return super().features | GpuFeature.EDID

    def config_space(self) -> bytes:
        # QEMU keeps events_read and events_clear itself, and puts its own num_scanouts over ours.
        return CONFIG.pack(0, 0, len(self.screen.scanouts), 0, 0)

    def set_features(self, features: int) -> None:
        super().set_features(features)
        self._commands.has_edid = bool(features & GpuFeature.EDID)

    def take_gpu_socket(self, fd: int) -> bool:
        """Errors: ProtocolError when `fd` is no unix stream socket; it stays the caller's then."""
        self.screen.display.attach(fd)
        return True

    def start_queue(self, queue: int, *, resumed: bool) -> None:
        if not self._is_loaded:
            # The state says of its last change that it holds if a used index got there.
            self._is_loaded = not resumed or self._load()
            if not self._is_loaded:
                return
            if self.on_damage is not None:
                self.on_damage(self.damage_serial)
            for other in self.queues:
                if other.attached and other.index != queue:
                    self.loop.call_soon(lambda index=other.index: self._catch_up(index))  # type: ignore[misc]
        if queue == CONTROL and self.queues[CONTROL].is_unused:
            # A driver that begins knows of no resource: the guest was reset.
            self._forget()

    def _catch_up(self, queue: int) -> None:
        """A queue that was kicked before the state could be read."""
        if self.queues[queue].attached:
            try:
                more = self.process(queue)
            except QueueError:
                return
            if more:
                self.loop.call_soon(lambda: self._catch_up(queue))

    def stop_queue(self, queue: int) -> None:
        if queue == CONTROL:
            self._table.forget_memory()

    def reset_device(self) -> None:
        """Its resources and scanouts go; the display stays."""
        super().reset_device()
        self._commands.has_edid = False
        self._is_loaded = True
        self._forget()

    def reset(self) -> None:
        super().reset()
        self.screen.display.detach()

    def close(self) -> None:
        """Let go of the display and of the heap's mapping; the memfds keep what a successor needs."""
        self.screen.display.detach()
        self._table.forget_memory()
        self.heap.close()

    def process(self, queue: int) -> bool:
        if not self._is_loaded:
            return False
        vring = self.queues[queue]
        commands = self._commands
        budget = self.BUDGET
        commands.copied_bytes = 0
        while budget and commands.copied_bytes < _TURN_BYTES:
            try:
                chain = vring.pop()
            except QueueError:
                vring.publish()
                raise
            if chain is None:
                vring.publish()
                if not vring.arm():
                    return False
                continue
            budget -= 1
            vring.push(chain.head, commands.serve(vring, chain))
            if commands.is_changed:
                commands.is_changed = False
                self._state.save(self._pack(), queue, vring.next_used_index)
                vring.publish()
                self._state.commit()
                self._table.collect()
        vring.publish()
        return True

    # -- the host's side -----------------------------------------------------------------------------------------

    def frame(self, scanout: int = 0, *, with_cursor: bool = False) -> ScanoutFrame:
        """See `Screen.frame`."""
        return self.screen.frame(scanout, with_cursor=with_cursor)

    def cursor(self, scanout: int = 0) -> Cursor | None:
        """See `Screen.cursor`."""
        return self.screen.cursor(scanout)

    @property
    def on_damage(self) -> Callable[[int], object] | None:
        """Called with the new serial after every change of a picture that is shown."""
        return self.screen.damage.on_damage

    @on_damage.setter
    def on_damage(self, hook: Callable[[int], object] | None) -> None:
        self.screen.damage.on_damage = hook

    @property
    def damage_serial(self) -> int:
        """Of the newest change of any monitor's picture."""
        return self.screen.damage.serial

    def resize(self, scanout: int, width: int, height: int) -> bool:
        """Give a monitor another mode, which the guest reads once its frontend tells it to look (VIRTIO 1.3, 5.7.5).

        False until a successor knows its predecessor's state; `on_damage` tells. Errors: RequestError when there is no
        such scanout, or the mode is impossible.
        """
        if not self._is_loaded:
            return False
        self.screen.resize(scanout, width, height, _check_mode)
        self._save_now()
        return True

    LIMITS = (Limit.MEMORY,)
    LEAST = PAGE_BYTES

    def limit(self, limit: Limit) -> int:
        return self.heap.limit_bytes

    def apply_limit(self, limit: Limit, value: int) -> None:
        """Memory in use stays; no more is given out before enough was freed."""
        if not PAGE_BYTES <= value <= self.heap.size_bytes:
            raise RequestError(
                f"GPU memory of {value} bytes: {PAGE_BYTES} to {self.heap.size_bytes} are allowed while the guest runs"
            )
        self.heap.limit_bytes = value // PAGE_BYTES * PAGE_BYTES

    def apply_ceilings(self, ceilings: Mapping[str, int]) -> None:
        self.cap_limit(Limit.MEMORY, ceilings["gpu_memory"])

    def listen(self, on_news: Callable[[], None]) -> None:
        self.on_damage = lambda _scanout: on_news()

    def snapshot(self) -> dict[str, Any]:
        return {
            **super().snapshot(),
            "memory": {
                "used_bytes": self.heap.used_bytes,
                "quota_bytes": self.heap.limit_bytes,
                "resources": len(self._table),
            },
            "damage_serial": self.damage_serial,
            "scanouts": self.screen.snapshot(),
            "display": self.screen.display.snapshot(),
        }

    # -- state ---------------------------------------------------------------------------------------------------

    def _pack(self) -> bytes:
        return saved.pack(self.screen.scanouts, self._table, self.damage_serial)

    def _load(self) -> bool:
        """Take over the state of a predecessor, if there is one; False while a queue's used index is needed for it.

        Errors: ConfigurationError when the state is of a device that was made with other arguments.
        """
        try:
            state = self._state.load(self._is_published)
        except _NotAttachedError:
            return False
        if state is None:
            return True
        try:
            serial = saved.restore(state, self.screen.scanouts, self._table)
        except ValueError as error:
            raise ConfigurationError(f"the saved GPU state does not fit: {error}") from None
        self.screen.show_again()
        self.screen.damage.next_generation(serial)
        self._save_now()
        return True

    def _is_published(self, queue: int, used_index: int) -> bool:
        vring = self.queues[queue]
        if not vring.attached:
            raise _NotAttachedError
        return (vring.used_index - used_index) & 0xFFFF < 0x8000

    def _forget(self) -> None:
        """Everything that a driver set up."""
        if len(self._table) == 0 and self.screen.is_off:
            return
        self._table.drop_all()
        self.screen.switch_off()
        self._save_now()
        self._table.collect()

    def _save_now(self) -> None:
        """A change that no chain made: it holds at once."""
        self._state.save(self._pack())
        self._state.commit()


def _check_mode(width: int, height: int) -> None:
    """Errors: RequestError for a mode that a monitor cannot tell of."""
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise RequestError(f"a display of {width}x{height}: 1 to {MAX_SIDE} pixels a side are allowed")

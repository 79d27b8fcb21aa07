"""The GPU: commands off the control and cursor queues, onto resources and scanouts (VIRTIO 1.3, 5.7.6).

A guest's frame travels: TRANSFER_TO_HOST_2D -> gate -> `ResourceTable.transfer` (guest pages into the heap), then
RESOURCE_FLUSH -> `_flush` -> damage to `Display` (QEMU's consoles) and to `on_damage` (our own viewers, `frame`).

Crash-exact: a command that changes what exists is saved, published and committed before the next one is begun
(devices/state.py), and what it dropped is freed only after that. The pixels are in the heap's memfd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, NamedTuple

from devices.backend import Backend
from devices.errors import ConfigurationError, QueueError, RequestError
from devices.gate import OPEN, Denial, Gate, Op
from devices.gpu import saved
from devices.gpu.display import Display
from devices.gpu.edid import MAX_SIDE
from devices.gpu.edid import build as build_edid
from devices.gpu.heap import PAGE_BYTES, Heap
from devices.gpu.resource import CommandError, ResourceTable
from devices.gpu.scanout import MAX_SCANOUT_SIDE, Cursor, Frame, Scanout, cursor_picture
from devices.gpu.wire import (
    CONFIG,
    CURSOR_SIDE,
    DISPLAY_INFO_BYTES,
    DISPLAY_ONE,
    EDID_BYTES,
    EDID_SIZE,
    ENTRIES_OFFSET,
    HEADER_BYTES,
    MAX_COMMAND_BYTES,
    MAX_EDID_BYTES,
    MAX_SCANOUTS,
    MEMORY_ENTRY,
    PIXEL_BYTES,
    Answer,
    AttachBacking,
    Command,
    GpuFeature,
    Header,
    ResourceCreate2d,
    ResourceFlush,
    ResourceId,
    SetScanout,
    TransferToHost2d,
    UpdateCursor,
)
from devices.loop import Loop
from devices.state import StateStore
from devices.stats import Stats
from devices.virtio.chain import Chain
from devices.virtio.features import DeviceId

CONTROL: Final = 0
CURSOR: Final = 1

#: The source report's quota.
DEFAULT_QUOTA_BYTES: Final = 128 << 20
#: Bytes copied in one turn, before other devices have theirs: about 10 ms.
_TURN_BYTES: Final = 32 << 20

#: A successor's serials begin a generation higher, so none is ever given twice.
_SERIAL_GENERATION: Final = 32


class _Handler(NamedTuple):
    """How a command is done: `run(data, chain)` returns the answer's body. `op` is what a refusal counts as."""

    run: Callable[[bytes, Chain], bytes]
    op: Op
    command_bytes: int
    answer: Answer
    answer_bytes: int


class _NotAttachedError(Exception):
    """The saved state depends on a queue whose used index is not to be seen yet."""


class GpuBackend(Backend):
    """A 2D GPU with `scanouts` monitors of `width` by `height` pixels.

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
        quota_bytes: int = DEFAULT_QUOTA_BYTES,
        heap_fd: int | None = None,
        state: StateStore | None = None,
        gate: Gate = OPEN,
    ) -> None:
        """Errors: ConfigurationError for a mode, scanout count or quota that is impossible."""
        stats = Stats(Op.GPU_ALLOC, Op.GPU_FREE, Op.GPU_RENDER, Op.GPU_READBACK)
        super().__init__(name, 2, loop, stats, gate)
        if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
            raise ConfigurationError(
                f"a display of {width}x{height}: 1 to {MAX_SIDE} pixels a side are allowed"
            )
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
        self.width = width
        self.height = height
        self.damage_serial = 0
        #: Called with the new serial after every change of a picture that is shown.
        self.on_damage: Callable[[int], None] | None = None
        self.heap = Heap(heap_fd, quota_bytes)
        self.scanouts = [Scanout(index) for index in range(scanouts)]
        self.display = Display(loop, self.heap.view, self.scanouts)
        self._table = ResourceTable(self.heap)
        self._state = state or StateStore(None, self.STATE_BYTES)
        self._is_changed = False
        self._copied_bytes = 0
        self._handlers = self._make_handlers()
        self._cursor_handlers = self._make_cursor_handlers()
        self._is_loaded = self._load()

    def _make_handlers(self) -> dict[int, _Handler]:
        """The control queue's commands (5.7.6.8); every other one is answered ERR_UNSPEC."""
        ok = Answer.OK_NODATA
        plain = HEADER_BYTES
        return {
            Command.GET_DISPLAY_INFO: _Handler(
                self._get_display_info, Op.GPU_RENDER, plain, Answer.OK_DISPLAY_INFO, DISPLAY_INFO_BYTES
            ),
            Command.GET_EDID: _Handler(
                self._get_edid, Op.GPU_RENDER, plain + ResourceId.STRUCT.size, Answer.OK_EDID, EDID_BYTES
            ),
            Command.GET_CAPSET_INFO: _Handler(self._get_capset, Op.GPU_RENDER, plain, ok, plain),
            Command.GET_CAPSET: _Handler(self._get_capset, Op.GPU_RENDER, plain, ok, plain),
            Command.RESOURCE_CREATE_2D: _Handler(
                self._create, Op.GPU_ALLOC, plain + ResourceCreate2d.STRUCT.size, ok, plain
            ),
            Command.RESOURCE_UNREF: _Handler(
                self._unref, Op.GPU_FREE, plain + ResourceId.STRUCT.size, ok, plain
            ),
            Command.RESOURCE_ATTACH_BACKING: _Handler(
                self._attach, Op.GPU_ALLOC, plain + AttachBacking.STRUCT.size, ok, plain
            ),
            Command.RESOURCE_DETACH_BACKING: _Handler(
                self._detach, Op.GPU_FREE, plain + ResourceId.STRUCT.size, ok, plain
            ),
            Command.SET_SCANOUT: _Handler(
                self._set_scanout, Op.GPU_RENDER, plain + SetScanout.STRUCT.size, ok, plain
            ),
            Command.TRANSFER_TO_HOST_2D: _Handler(
                self._transfer, Op.GPU_RENDER, plain + TransferToHost2d.STRUCT.size, ok, plain
            ),
            Command.RESOURCE_FLUSH: _Handler(
                self._flush, Op.GPU_RENDER, plain + ResourceFlush.STRUCT.size, ok, plain
            ),
        }

    def _make_cursor_handlers(self) -> dict[int, _Handler]:
        """The cursor queue's commands (5.7.6.10); the Linux driver gives them no room for an answer."""
        size = HEADER_BYTES + UpdateCursor.STRUCT.size
        return {
            Command.UPDATE_CURSOR: _Handler(self._update_cursor, Op.GPU_RENDER, size, Answer.OK_NODATA, 0),
            Command.MOVE_CURSOR: _Handler(self._move_cursor, Op.GPU_RENDER, size, Answer.OK_NODATA, 0),
        }

    # -- what the session sees -----------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        return super().features | GpuFeature.EDID

    def config_space(self) -> bytes:
        # QEMU keeps events_read and events_clear itself, and puts its own num_scanouts over ours.
        return CONFIG.pack(0, 0, len(self.scanouts), 0, 0)

    def take_gpu_socket(self, fd: int) -> bool:
        """Errors: ProtocolError when `fd` is no unix stream socket; it stays the caller's then."""
        self.display.attach(fd)
        return True

    def start_queue(self, queue: int, *, resumed: bool) -> None:
        if not self._is_loaded:
            # The state says of its last change that it holds if a used index got there.
            self._is_loaded = not resumed or self._load()
            if not self._is_loaded:
                return
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

    def reset(self) -> None:
        """The frontend left: its resources, scanouts and display go."""
        super().reset()
        self._is_loaded = True
        self._forget()
        self.display.detach()

    def close(self) -> None:
        """Let go of the display and of the heap's mapping; the memfds keep what a successor needs."""
        self.display.detach()
        self._table.forget_memory()
        self.heap.close()

    def process(self, queue: int) -> bool:
        if not self._is_loaded:
            return False
        vring = self.queues[queue]
        handlers = self._handlers if queue == CONTROL else self._cursor_handlers
        budget = self.BUDGET
        self._copied_bytes = 0
        while budget and self._copied_bytes < _TURN_BYTES:
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
            vring.push(chain.head, self._serve(queue, handlers, chain))
            if self._is_changed:
                self._is_changed = False
                self._state.save(self._pack(), queue, vring.next_used_index)
                vring.publish()
                self._state.commit()
                self._table.collect()
        vring.publish()
        return True

    def _serve(self, queue: int, handlers: dict[int, _Handler], chain: Chain) -> int:
        """Do one command; returns the bytes of its answer, 0 for a chain that has no room for it."""
        data = chain.read(MAX_COMMAND_BYTES)
        room = chain.writable_bytes
        if len(data) < HEADER_BYTES or (room < HEADER_BYTES and queue == CONTROL):
            self.queues[queue].chain_errors += 1
            return 0
        header = Header.unpack(data)
        handler = handlers.get(header.kind)
        if handler is None:
            self.stats.deny(Op.GPU_RENDER, Denial.INVALID)
            answer = header.answer(Answer.ERR_UNSPEC)
        elif room < handler.answer_bytes:
            self.queues[queue].chain_errors += 1
            return 0
        elif len(data) < handler.command_bytes:
            self.stats.deny(handler.op, Denial.INVALID)
            answer = header.answer(Answer.ERR_INVALID_PARAMETER)
        else:
            try:
                body = handler.run(data, chain)
                answer = header.answer(handler.answer) + body
            except CommandError as error:
                self.stats.deny(handler.op, error.denial)
                answer = header.answer(error.answer)
        return chain.write(answer) if room >= len(answer) else 0

    def _ask(self, op: Op, size_bytes: int) -> None:
        denial = self.gate.check(op, size_bytes)
        if denial is not None:
            answer = Answer.ERR_OUT_OF_MEMORY if denial is Denial.QUOTA else Answer.ERR_UNSPEC
            raise CommandError(answer, f"{op.value} of {size_bytes} bytes is denied", denial)

    # -- information ---------------------------------------------------------------------------------------------

    def _get_display_info(self, _data: bytes, _chain: Chain) -> bytes:
        modes = b"".join(
            DISPLAY_ONE.pack(index * self.width, 0, self.width, self.height, 1, 0)
            for index in range(len(self.scanouts))
        )
        return modes.ljust(DISPLAY_INFO_BYTES - HEADER_BYTES, b"\0")

    def _get_edid(self, data: bytes, _chain: Chain) -> bytes:
        if not self.acked_features & GpuFeature.EDID:
            raise CommandError(Answer.ERR_UNSPEC, "GET_EDID without its feature")
        index = ResourceId.unpack(data).value
        if index >= len(self.scanouts):
            raise CommandError(
                Answer.ERR_INVALID_PARAMETER, f"EDID of scanout {index} of {len(self.scanouts)}"
            )
        block = build_edid(self.width, self.height, serial=index + 1)
        return EDID_SIZE.pack(len(block)) + block.ljust(MAX_EDID_BYTES, b"\0")

    def _get_capset(self, _data: bytes, _chain: Chain) -> bytes:
        raise CommandError(Answer.ERR_INVALID_PARAMETER, "there are no capability sets")

    # -- resources -----------------------------------------------------------------------------------------------

    def _create(self, data: bytes, _chain: Chain) -> bytes:
        command = ResourceCreate2d.unpack(data)
        wanted = (command.resource_id, command.format, command.width, command.height)
        size = self._table.check_new(*wanted)
        self._ask(Op.GPU_ALLOC, size)
        self._table.create(*wanted)
        self.stats.allow(Op.GPU_ALLOC, size)
        self._is_changed = True
        return b""

    def _unref(self, data: bytes, _chain: Chain) -> bytes:
        resource = self._table[ResourceId.unpack(data).value]
        size = self._table.cost(resource)
        self._ask(Op.GPU_FREE, size)
        for scanout in self.scanouts:
            if scanout.resource is resource:
                scanout.switch_off()
                self._show(scanout)
            if scanout.cursor_resource_id == resource.resource_id:
                scanout.cursor_resource_id = 0  # the shape stays: it was copied
        self._table.drop(resource)
        self.stats.allow(Op.GPU_FREE, size)
        self._is_changed = True
        return b""

    def _attach(self, data: bytes, chain: Chain) -> bytes:
        command = AttachBacking.unpack(data)
        resource = self._table[command.resource_id]
        size = self._table.check_backing(resource, command.entries)
        length = command.entries * MEMORY_ENTRY.size
        entries = chain.read(length, ENTRIES_OFFSET)
        if len(entries) != length:
            raise CommandError(
                Answer.ERR_INVALID_PARAMETER, f"{command.entries} entries in {len(entries)} bytes of command"
            )
        self._ask(Op.GPU_ALLOC, size)
        self._table.attach(resource, entries, self.queues[CONTROL].memory)
        self.stats.allow(Op.GPU_ALLOC, size)
        self._is_changed = True
        return b""

    def _detach(self, data: bytes, _chain: Chain) -> bytes:
        resource = self._table[ResourceId.unpack(data).value]
        size = self._table.backing_cost(resource)
        self._ask(Op.GPU_FREE, size)
        self._table.detach(resource)
        self.stats.allow(Op.GPU_FREE, size)
        self._is_changed = True
        return b""

    # -- rendering -----------------------------------------------------------------------------------------------

    def _transfer(self, data: bytes, _chain: Chain) -> bytes:
        command = TransferToHost2d.unpack(data)
        resource = self._table[command.resource_id]
        self._ask(Op.GPU_RENDER, command.rect.width * command.rect.height * PIXEL_BYTES)
        copied = self._table.transfer(resource, command.rect, command.offset, self.queues[CONTROL].memory)
        self._copied_bytes += copied
        self.stats.allow(Op.GPU_RENDER, copied)
        return b""

    def _flush(self, data: bytes, _chain: Chain) -> bytes:
        command = ResourceFlush.unpack(data)
        resource = self._table[command.resource_id]
        rect = command.rect
        if not rect.is_within(resource.width, resource.height):
            raise CommandError(
                Answer.ERR_INVALID_PARAMETER, f"flush of {rect} of {resource.width}x{resource.height} pixels"
            )
        size = rect.width * rect.height * PIXEL_BYTES
        self._ask(Op.GPU_RENDER, size)
        is_shown = False
        for scanout in self.scanouts:
            if scanout.resource is resource and (part := scanout.visible(rect)) is not None:
                self.display.damage(scanout.index, part)
                is_shown = True
        if is_shown:
            self._count_damage()
        self.stats.allow(Op.GPU_RENDER, size)
        return b""

    def _set_scanout(self, data: bytes, _chain: Chain) -> bytes:
        command = SetScanout.unpack(data)
        scanout = self._scanout(command.scanout_id)
        rect = command.rect
        resource = None
        if command.resource_id:
            resource = self._table[command.resource_id]
            if not rect.is_within(resource.width, resource.height) or max(rect[2:]) > MAX_SCANOUT_SIDE:
                raise CommandError(
                    Answer.ERR_INVALID_PARAMETER,
                    f"scanout of {rect} of {resource.width}x{resource.height} pixels, "
                    f"at most {MAX_SCANOUT_SIDE} a side are allowed",
                )
        self._ask(Op.GPU_RENDER, 0)
        if resource is None:
            scanout.switch_off()
        else:
            scanout.resource = resource
            scanout.rect = rect
        self._show(scanout)
        self.stats.allow(Op.GPU_RENDER)
        self._is_changed = True
        return b""

    def _scanout(self, index: int) -> Scanout:
        if index >= len(self.scanouts):
            raise CommandError(Answer.ERR_INVALID_SCANOUT_ID, f"scanout {index} of {len(self.scanouts)}")
        return self.scanouts[index]

    def _show(self, scanout: Scanout) -> None:
        self.display.change(scanout.index)
        self._count_damage()

    def _count_damage(self) -> None:
        self.damage_serial += 1
        if self.on_damage is not None:
            self.on_damage(self.damage_serial)

    # -- cursor --------------------------------------------------------------------------------------------------

    def _update_cursor(self, data: bytes, _chain: Chain) -> bytes:
        command = UpdateCursor.unpack(data)
        scanout = self._scanout(command.scanout_id)
        pixels = b""
        if command.resource_id:
            resource = self._table[command.resource_id]
            if max(command.hot_x, command.hot_y) >= CURSOR_SIDE:
                raise CommandError(
                    Answer.ERR_INVALID_PARAMETER,
                    f"hot spot {command.hot_x},{command.hot_y}: below {CURSOR_SIDE} is allowed",
                )
            pixels = cursor_picture(resource, self.heap.view) or b""
            if not pixels:
                raise CommandError(
                    Answer.ERR_INVALID_PARAMETER,
                    f"a cursor of {resource.width}x{resource.height}: {CURSOR_SIDE} a side is allowed",
                )
        self._ask(Op.GPU_RENDER, len(pixels))
        scanout.is_cursor_shown = bool(pixels)
        scanout.cursor_resource_id = command.resource_id
        scanout.cursor_x, scanout.cursor_y = command.x, command.y
        scanout.hot_x, scanout.hot_y = (command.hot_x, command.hot_y) if pixels else (0, 0)
        scanout.cursor_pixels = pixels
        self.display.move_cursor(scanout.index, is_new=True)
        self.stats.allow(Op.GPU_RENDER, len(pixels))
        self._is_changed = True
        return b""

    def _move_cursor(self, data: bytes, _chain: Chain) -> bytes:
        command = UpdateCursor.unpack(data)
        scanout = self._scanout(command.scanout_id)
        self._ask(Op.GPU_RENDER, 0)
        scanout.cursor_x, scanout.cursor_y = command.x, command.y
        self.display.move_cursor(scanout.index, is_new=False)
        self.stats.allow(Op.GPU_RENDER)
        self._is_changed = True
        return b""

    # -- pictures ------------------------------------------------------------------------------------------------

    def frame(self, scanout: int = 0) -> Frame:
        """What the monitor shows now, without the cursor; black in the chosen mode while the guest has it off.

        Errors: IndexError when there is no such scanout; RequestError when the gate denies the read-back.
        """
        shown = self.scanouts[scanout]
        width, height = shown.rect[2:] if shown.resource is not None else (self.width, self.height)
        size = width * height * PIXEL_BYTES
        denial = self.gate.check(Op.GPU_READBACK, size)
        if denial is not None:
            self.stats.deny(Op.GPU_READBACK, denial)
            raise RequestError(f"reading a picture of {size} bytes back is denied ({denial.value})")
        pixels = bytes(size) if shown.resource is None else shown.picture(self.heap.view)
        self.stats.allow(Op.GPU_READBACK, size)
        return Frame(width, height, width * PIXEL_BYTES, pixels, self.damage_serial)

    def cursor(self, scanout: int = 0) -> Cursor | None:
        """The cursor plane; None while it is hidden, or its shape died with a predecessor."""
        shown = self.scanouts[scanout]
        if not shown.cursor_pixels:
            return None
        return Cursor(shown.cursor_x, shown.cursor_y, shown.hot_x, shown.hot_y, shown.cursor_pixels)

    def snapshot(self) -> dict[str, Any]:
        return {
            **super().snapshot(),
            "memory": {
                "used_bytes": self.heap.used_bytes,
                "quota_bytes": self.heap.size_bytes,
                "resources": len(self._table),
            },
            "damage_serial": self.damage_serial,
            "display": self.display.snapshot(),
        }

    # -- state ---------------------------------------------------------------------------------------------------

    def _pack(self) -> bytes:
        return saved.pack(self.scanouts, self._table, self.damage_serial)

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
            serial = saved.restore(state, self.scanouts, self._table)
        except ValueError as error:
            raise ConfigurationError(f"the saved GPU state does not fit: {error}") from None
        for scanout in self.scanouts:
            self.display.change(scanout.index)
            self.display.move_cursor(scanout.index, is_new=True)
        self.damage_serial = ((serial >> _SERIAL_GENERATION) + 1) << _SERIAL_GENERATION
        self._save_now()
        return True

    def _is_published(self, queue: int, used_index: int) -> bool:
        vring = self.queues[queue]
        if not vring.attached:
            raise _NotAttachedError
        return (vring.used_index - used_index) & 0xFFFF < 0x8000

    def _forget(self) -> None:
        """Everything that a driver set up."""
        if len(self._table) == 0 and all(s.resource is None and not s.is_cursor_shown for s in self.scanouts):
            return
        self._table.drop_all()
        for scanout in self.scanouts:
            scanout.switch_off()
            scanout.hide_cursor()
            self.display.move_cursor(scanout.index, is_new=True)
            self._show(scanout)
        self._save_now()
        self._table.collect()

    def _save_now(self) -> None:
        """A change that no chain made: it holds at once."""
        self._state.save(self._pack())
        self._state.commit()

"""The commands of both queues, done: onto resources and onto the screen (VIRTIO 1.3, 5.7.6.8 and 5.7.6.10).

Each is asked of the gate, performed and counted; a refusal is an error answer, never an exception that leaves here. No
queue and no state store is known here: `is_changed` tells that what a successor must know has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from rayos_devices.gate import Denial, Gate, Op
from rayos_devices.gpu.edid import build as build_edid
from rayos_devices.gpu.resource import CommandError, ResourceTable
from rayos_devices.gpu.scanout import MAX_SCANOUT_SIDE, Scanout, cursor_picture
from rayos_devices.gpu.screen import Screen
from rayos_devices.gpu.wire import (
    CURSOR_SIDE,
    DISPLAY_INFO_BYTES,
    DISPLAY_ONE,
    EDID_SIZE,
    ENTRIES_OFFSET,
    HEADER_BYTES,
    MAX_COMMAND_BYTES,
    MAX_EDID_BYTES,
    MEMORY_ENTRY,
    PIXEL_BYTES,
    Answer,
    AttachBacking,
    Command,
    Header,
    ResourceCreate2d,
    ResourceFlush,
    ResourceId,
    SetScanout,
    TransferToHost2d,
    UpdateCursor,
)
from rayos_devices.native import now_ns
from rayos_devices.stats import Stats
from rayos_devices.virtio.chain import Chain
from rayos_devices.virtio.vring import Vring

CONTROL: Final = 0
CURSOR: Final = 1


class _Handler(NamedTuple):
    """How a command is done: `run(data, chain)` returns the answer's body. `op` is what a refusal counts as."""

    run: Callable[[bytes, Chain], bytes]
    op: Op
    command_bytes: int
    answer: Answer


class Commands:
    """Guest memory is `control`'s; `modes` are offered beside each monitor's own."""

    def __init__(
        self,
        screen: Screen,
        table: ResourceTable,
        control: Vring,
        stats: Stats,
        gate: Gate,
        modes: Sequence[tuple[int, int]],
    ) -> None:
        self._screen = screen
        self._table = table
        self._control = control
        self._stats = stats
        self._gate = gate
        self._modes = tuple(modes)
        self.has_edid = False
        self.is_changed = False
        self.copied_bytes = 0
        self._started = 0
        self._handlers = self._make_handlers()
        self._cursor_handlers = self._make_cursor_handlers()

    def _make_handlers(self) -> dict[int, _Handler]:
        """The control queue's commands (5.7.6.8); every other one is answered ERR_UNSPEC."""
        ok = Answer.OK_NODATA
        plain = HEADER_BYTES
        return {
            Command.GET_DISPLAY_INFO: _Handler(
                self._get_display_info, Op.GPU_RENDER, plain, Answer.OK_DISPLAY_INFO
            ),
            Command.GET_EDID: _Handler(
                self._get_edid, Op.GPU_RENDER, plain + ResourceId.STRUCT.size, Answer.OK_EDID
            ),
            Command.GET_CAPSET_INFO: _Handler(self._get_capset, Op.GPU_RENDER, plain, ok),
            Command.GET_CAPSET: _Handler(self._get_capset, Op.GPU_RENDER, plain, ok),
            Command.RESOURCE_CREATE_2D: _Handler(
                self._create, Op.GPU_ALLOC, plain + ResourceCreate2d.STRUCT.size, ok
            ),
            Command.RESOURCE_UNREF: _Handler(self._unref, Op.GPU_FREE, plain + ResourceId.STRUCT.size, ok),
            Command.RESOURCE_ATTACH_BACKING: _Handler(
                self._attach, Op.GPU_ALLOC, plain + AttachBacking.STRUCT.size, ok
            ),
            Command.RESOURCE_DETACH_BACKING: _Handler(
                self._detach, Op.GPU_FREE, plain + ResourceId.STRUCT.size, ok
            ),
            Command.SET_SCANOUT: _Handler(
                self._set_scanout, Op.GPU_RENDER, plain + SetScanout.STRUCT.size, ok
            ),
            Command.TRANSFER_TO_HOST_2D: _Handler(
                self._transfer, Op.GPU_RENDER, plain + TransferToHost2d.STRUCT.size, ok
            ),
            Command.RESOURCE_FLUSH: _Handler(
                self._flush, Op.GPU_RENDER, plain + ResourceFlush.STRUCT.size, ok
            ),
        }

    def _make_cursor_handlers(self) -> dict[int, _Handler]:
        """The cursor queue's commands (5.7.6.10); the Linux driver gives them no room for an answer."""
        size = HEADER_BYTES + UpdateCursor.STRUCT.size
        return {
            Command.UPDATE_CURSOR: _Handler(self._update_cursor, Op.GPU_RENDER, size, Answer.OK_NODATA),
            Command.MOVE_CURSOR: _Handler(self._move_cursor, Op.GPU_RENDER, size, Answer.OK_NODATA),
        }

    def serve(self, vring: Vring, chain: Chain) -> int:
        """Do one command; returns the bytes of its answer that there was room for, as QEMU cuts them, too."""
        self._started = now_ns()
        is_control = vring.index == CONTROL
        data = chain.read(MAX_COMMAND_BYTES)
        if len(data) < HEADER_BYTES:
            vring.chain_errors += 1
            return 0
        header = Header.unpack(data)
        handler = (self._handlers if is_control else self._cursor_handlers).get(header.kind)
        if handler is None:
            self._stats.deny(Op.GPU_RENDER, Denial.INVALID, 0, self._started)
            answer = header.answer(Answer.ERR_UNSPEC)
        elif len(data) < handler.command_bytes:
            self._stats.deny(handler.op, Denial.INVALID, 0, self._started)
            answer = header.answer(Answer.ERR_INVALID_PARAMETER)
        else:
            try:
                body = handler.run(data, chain)
                answer = header.answer(handler.answer) + body
            except CommandError as error:
                self._stats.deny(handler.op, error.denial, 0, self._started)
                answer = header.answer(error.answer)
        return chain.write(answer)

    def _ask(self, op: Op, size_bytes: int) -> None:
        denial = self._gate.check(op, size_bytes)
        if denial is not None:
            answer = Answer.ERR_OUT_OF_MEMORY if denial is Denial.QUOTA else Answer.ERR_UNSPEC
            raise CommandError(answer, f"{op.value} of {size_bytes} bytes is denied", denial)

    # -- information ---------------------------------------------------------------------------------------------

    def _get_display_info(self, _data: bytes, _chain: Chain) -> bytes:
        modes, left = b"", 0
        for scanout in self._screen.scanouts:
            modes += DISPLAY_ONE.pack(left, 0, scanout.width, scanout.height, 1, 0)
            left += scanout.width
        return modes.ljust(DISPLAY_INFO_BYTES - HEADER_BYTES, b"\0")

    def _get_edid(self, data: bytes, _chain: Chain) -> bytes:
        if not self.has_edid:
            raise CommandError(Answer.ERR_UNSPEC, "GET_EDID without its feature")
        index = ResourceId.unpack(data).value
        if index >= len(self._screen.scanouts):
            raise CommandError(
                Answer.ERR_INVALID_PARAMETER, f"EDID of scanout {index} of {len(self._screen.scanouts)}"
            )
        scanout = self._screen.scanouts[index]
        block = build_edid(scanout.width, scanout.height, self._modes, serial=index + 1)
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
        self._stats.allow(Op.GPU_ALLOC, size, self._started)
        self.is_changed = True
        return b""

    def _unref(self, data: bytes, _chain: Chain) -> bytes:
        resource = self._table[ResourceId.unpack(data).value]
        size = self._table.cost(resource)
        self._ask(Op.GPU_FREE, size)
        for scanout in self._screen.scanouts:
            if scanout.resource is resource:
                scanout.switch_off()
                self._screen.show(scanout)
            if scanout.cursor_resource_id == resource.resource_id:
                scanout.cursor_resource_id = 0  # the shape stays: it was copied
        self._table.drop(resource)
        self._stats.allow(Op.GPU_FREE, size, self._started)
        self.is_changed = True
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
        self._table.attach(resource, entries, self._control.memory)
        self._stats.allow(Op.GPU_ALLOC, size, self._started)
        self.is_changed = True
        return b""

    def _detach(self, data: bytes, _chain: Chain) -> bytes:
        resource = self._table[ResourceId.unpack(data).value]
        size = self._table.backing_cost(resource)
        self._ask(Op.GPU_FREE, size)
        self._table.detach(resource)
        self._stats.allow(Op.GPU_FREE, size, self._started)
        self.is_changed = True
        return b""

    # -- rendering -----------------------------------------------------------------------------------------------

    def _transfer(self, data: bytes, _chain: Chain) -> bytes:
        command = TransferToHost2d.unpack(data)
        resource = self._table[command.resource_id]
        self._ask(Op.GPU_RENDER, command.rect.width * command.rect.height * PIXEL_BYTES)
        copied = self._table.transfer(resource, command.rect, command.offset, self._control.memory)
        self.copied_bytes += copied
        self._stats.allow(Op.GPU_RENDER, copied, self._started)
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
        self._screen.flush(
            [
                (scanout.index, part)
                for scanout in self._screen.scanouts
                if scanout.resource is resource and (part := scanout.visible(rect)) is not None
            ]
        )
        self._stats.allow(Op.GPU_RENDER, size, self._started)
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
        self._screen.show(scanout)
        self._stats.allow(Op.GPU_RENDER, 0, self._started)
        self.is_changed = True
        return b""

    def _scanout(self, index: int) -> Scanout:
        if index >= len(self._screen.scanouts):
            raise CommandError(
                Answer.ERR_INVALID_SCANOUT_ID, f"scanout {index} of {len(self._screen.scanouts)}"
            )
        return self._screen.scanouts[index]

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
            pixels = cursor_picture(resource, self._table.heap.view) or b""
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
        self._screen.display.move_cursor(scanout.index, is_new=True)
        self._stats.allow(Op.GPU_RENDER, len(pixels), self._started)
        self.is_changed = True
        return b""

    def _move_cursor(self, data: bytes, _chain: Chain) -> bytes:
        command = UpdateCursor.unpack(data)
        scanout = self._scanout(command.scanout_id)
        self._ask(Op.GPU_RENDER, 0)
        scanout.cursor_x, scanout.cursor_y = command.x, command.y
        self._screen.display.move_cursor(scanout.index, is_new=False)
        self._stats.allow(Op.GPU_RENDER, 0, self._started)
        self.is_changed = True
        return b""

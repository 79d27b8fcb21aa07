"""The resources a guest made, and where their pixels and backing pages lie (VIRTIO 1.3, 5.7.6.8).

A resource is a piece of the heap (its pixels, rows of width x 4 bytes) and perhaps a backing: a list of guest pages,
kept as the guest sent it in another piece of the heap. So the heap's quota covers both, and a record of 40 bytes is all
that a successor needs beside the heap. Guest addresses are turned into views when they are first used, and
forgotten before guest memory may change.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import Final

from rayos_devices.errors import ChainError, RequestError
from rayos_devices.gate import Denial
from rayos_devices.gpu.heap import PAGE_BYTES, Heap, pages_bytes
from rayos_devices.gpu.wire import MEMORY_ENTRY, PIXEL_BYTES, Answer, Format, Rect
from rayos_devices.virtio.memory import GuestMemory

#: Resources of one device. A Linux desktop has some dozens; the bound keeps the saved state small.
MAX_RESOURCES: Final = 1024

#: id, format, width, height, backing entries, padding, heap offset of the pixels, of the backing list.
_RECORD: Final = struct.Struct("<IIIIIIQQ")
RECORD_BYTES: Final = _RECORD.size

_FORMATS: Final = frozenset(Format)


class CommandError(RequestError):
    """A command that is answered with an error: which one, and why it counts as denied."""

    def __init__(self, answer: Answer, message: str, denial: Denial = Denial.INVALID) -> None:
        super().__init__(message)
        self.answer = answer
        self.denial = denial


class Backing:
    """The guest pages of one resource, as one range of bytes; the list itself lies at `offset` of the heap."""

    __slots__ = ("_starts", "_views", "count", "offset", "total_bytes")

    def __init__(self, offset: int, entries: memoryview) -> None:
        """`entries` are whole MEMORY_ENTRYs."""
        self.offset = offset
        self.count = len(entries) // MEMORY_ENTRY.size
        self.total_bytes = sum(length for _, length in MEMORY_ENTRY.iter_unpack(entries))
        self._starts: list[int] = []
        self._views: list[memoryview] = []

    @property
    def size_bytes(self) -> int:
        """Heap bytes of the list."""
        return self.count * MEMORY_ENTRY.size

    def forget(self) -> None:
        """Guest memory may change: the views of it must go."""
        self._starts = []
        self._views = []

    def resolve(self, memory: GuestMemory, entries: memoryview) -> None:
        """Find the pages in guest memory. Errors: ChainError when one is not there."""
        ranges: list[tuple[int, int]] = []
        end = -1
        for address, length in MEMORY_ENTRY.iter_unpack(entries):
            if address == end:
                first, before = ranges[-1]
                ranges[-1] = (first, before + length)
            else:
                ranges.append((address, length))
            end = address + length
        views = [view for piece in ranges for view in memory.views(*piece)]
        self._starts = list(accumulate(map(len, views), initial=0))[:-1]
        self._views = views

    @property
    def is_resolved(self) -> bool:
        return bool(self._views)

    def copy(self, source: int, target: memoryview, position: int, stride: int, row: int, rows: int) -> None:
        """Copy `rows` rows of `row` bytes, `stride` apart on both sides, from byte `source` to `position`.

        The caller has checked that the backing and the target hold all of it, and resolved.
        """
        starts, views = self._starts, self._views
        if row == stride:
            row, rows = row * rows, 1
        for _ in range(rows):
            index = bisect_right(starts, source) - 1
            view = views[index][source - starts[index] :]
            at, end = position, position + row
            while len(view) < end - at:
                target[at : at + len(view)] = view
                at += len(view)
                index += 1
                view = views[index]
            target[at:end] = view[: end - at]
            source += stride
            position += stride


class Resource:
    """One 2D resource."""

    __slots__ = ("backing", "format", "height", "offset", "resource_id", "size_bytes", "stride", "width")

    def __init__(self, resource_id: int, format_: Format, width: int, height: int, offset: int) -> None:
        self.resource_id = resource_id
        self.format = format_
        self.width = width
        self.height = height
        self.offset = offset
        self.stride = width * PIXEL_BYTES
        self.size_bytes = self.stride * height
        self.backing: Backing | None = None

    def pack(self) -> bytes:
        backing = self.backing
        return _RECORD.pack(
            self.resource_id,
            self.format,
            self.width,
            self.height,
            backing.count if backing else 0,
            0,
            self.offset,
            backing.offset if backing else 0,
        )


class ResourceTable:
    """All resources by id.

    What is dropped stays in the heap until `collect`, so that a state that was saved before still holds.
    """

    def __init__(self, heap: Heap) -> None:
        self.heap = heap
        self._resources: dict[int, Resource] = {}
        self._dropped: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._resources)

    def __getitem__(self, resource_id: int) -> Resource:
        """Errors: CommandError when there is none of that id."""
        resource = self._resources.get(resource_id)
        if resource is None:
            raise CommandError(Answer.ERR_INVALID_RESOURCE_ID, f"there is no resource {resource_id}")
        return resource

    def get(self, resource_id: int) -> Resource | None:
        return self._resources.get(resource_id)

    def check_new(self, resource_id: int, format_: int, width: int, height: int) -> int:
        """The heap bytes that such a resource would take. Errors: CommandError when it can not be."""
        if resource_id == 0 or resource_id in self._resources:
            why = "reserved" if resource_id == 0 else "in use"
            raise CommandError(Answer.ERR_INVALID_RESOURCE_ID, f"resource id {resource_id} is {why}")
        if format_ not in _FORMATS:
            raise CommandError(Answer.ERR_INVALID_PARAMETER, f"format {format_} is no 2D format")
        if width == 0 or height == 0:
            raise CommandError(
                Answer.ERR_INVALID_PARAMETER, f"a resource of {width}x{height} pixels is empty"
            )
        return pages_bytes(width * height * PIXEL_BYTES)

    def create(self, resource_id: int, format_: int, width: int, height: int) -> None:
        """Make a resource that `check_new` approved. Errors: CommandError when the quota has no room."""
        if len(self._resources) >= MAX_RESOURCES:
            raise CommandError(Answer.ERR_OUT_OF_MEMORY, f"more than {MAX_RESOURCES} resources", Denial.QUOTA)
        offset = self._allocate(width * height * PIXEL_BYTES)
        self._resources[resource_id] = Resource(resource_id, Format(format_), width, height, offset)

    def cost(self, resource: Resource) -> int:
        """Heap bytes of a resource and its backing."""
        backing = 0 if resource.backing is None else pages_bytes(resource.backing.size_bytes)
        return pages_bytes(resource.size_bytes) + backing

    def backing_cost(self, resource: Resource) -> int:
        """Heap bytes of the backing list. Errors: CommandError when there is none."""
        if resource.backing is None:
            raise CommandError(Answer.ERR_UNSPEC, f"resource {resource.resource_id} has no backing")
        return pages_bytes(resource.backing.size_bytes)

    def drop(self, resource: Resource) -> None:
        """Forget a resource and its backing."""
        self.detach(resource)
        del self._resources[resource.resource_id]
        self._dropped.append((resource.offset, resource.size_bytes))

    def check_backing(self, resource: Resource, count: int) -> int:
        """The heap bytes that a backing of `count` entries would take. Errors: CommandError."""
        most = pages_bytes(resource.size_bytes) // PAGE_BYTES + 1
        if not 1 <= count <= most:
            raise CommandError(
                Answer.ERR_INVALID_PARAMETER,
                f"a backing of {count} entries: 1 to {most} are allowed for {resource.size_bytes} bytes",
            )
        if resource.backing is not None:
            raise CommandError(Answer.ERR_UNSPEC, f"resource {resource.resource_id} has a backing already")
        return pages_bytes(count * MEMORY_ENTRY.size)

    def attach(self, resource: Resource, entries: bytes, memory: GuestMemory) -> None:
        """Give a resource the backing that `check_backing` approved.

        Errors: CommandError when an entry is empty or no guest memory, or the quota has no room.
        """
        if any(length == 0 for _, length in MEMORY_ENTRY.iter_unpack(entries)):
            raise CommandError(Answer.ERR_INVALID_PARAMETER, "a backing entry of 0 bytes")
        view = memoryview(entries)
        backing = Backing(0, view)
        try:
            backing.resolve(memory, view)
        except ChainError as error:
            raise CommandError(Answer.ERR_INVALID_PARAMETER, f"backing: {error}") from None
        backing.offset = self._allocate(len(entries))
        self.heap.view[backing.offset : backing.offset + len(entries)] = entries
        resource.backing = backing

    def detach(self, resource: Resource) -> None:
        """Forget a resource's backing, if it has one."""
        if resource.backing is not None:
            self._dropped.append((resource.backing.offset, resource.backing.size_bytes))
            resource.backing = None

    def transfer(self, resource: Resource, rect: Rect, offset: int, memory: GuestMemory) -> int:
        """Copy `rect` out of the backing, whose byte `offset` is its first pixel; returns the bytes copied.

        Errors: CommandError when the rectangle or its bytes are not wholly there.
        """
        backing = resource.backing
        if backing is None:
            raise CommandError(Answer.ERR_UNSPEC, f"resource {resource.resource_id} has no backing")
        if not rect.is_within(resource.width, resource.height):
            raise CommandError(
                Answer.ERR_INVALID_PARAMETER,
                f"transfer of {rect} into {resource.width}x{resource.height} pixels",
            )
        row = rect.width * PIXEL_BYTES
        end = offset + resource.stride * (rect.height - 1) + row
        if end > backing.total_bytes:
            raise CommandError(
                Answer.ERR_INVALID_PARAMETER,
                f"transfer up to byte {end} of a backing of {backing.total_bytes} bytes",
            )
        if not backing.is_resolved:
            try:
                backing.resolve(memory, self._entries(backing.offset, backing.count))
            except ChainError as error:
                raise CommandError(Answer.ERR_UNSPEC, f"backing: {error}") from None
        position = resource.offset + rect.y * resource.stride + rect.x * PIXEL_BYTES
        backing.copy(offset, self.heap.view, position, resource.stride, row, rect.height)
        return row * rect.height

    def forget_memory(self) -> None:
        """Guest memory may change after this returns."""
        for resource in self._resources.values():
            if resource.backing is not None:
                resource.backing.forget()

    def collect(self) -> None:
        """The state without the dropped pieces is safe: give them back."""
        for offset, size in self._dropped:
            self.heap.free(offset, size)
        self._dropped.clear()

    def drop_all(self) -> None:
        """Forget every resource."""
        for resource in list(self._resources.values()):
            self.drop(resource)

    def pack(self) -> bytes:
        return b"".join(resource.pack() for resource in self._resources.values())

    def restore(self, records: bytes) -> None:
        """Take over what `pack` of a predecessor said, over the same heap.

        Errors: ValueError when a record does not fit this heap: it is another one.
        """
        self._resources.clear()
        self._dropped.clear()
        self.heap.forget()
        for resource_id, format_, width, height, count, _, offset, list_offset in _RECORD.iter_unpack(
            records
        ):
            resource = Resource(resource_id, Format(format_), width, height, offset)
            pieces: Iterable[tuple[int, int]] = [(offset, resource.size_bytes)]
            if count:
                pieces = [*pieces, (list_offset, count * MEMORY_ENTRY.size)]
            for start, size in pieces:
                if not self.heap.reserve(start, size):
                    raise ValueError(
                        f"resource {resource_id}: {size} bytes at {start} are not free in this heap"
                    )
            if count:
                resource.backing = Backing(list_offset, self._entries(list_offset, count))
            self._resources[resource_id] = resource
        self.heap.scrub()

    def _entries(self, offset: int, count: int) -> memoryview:
        return self.heap.view[offset : offset + count * MEMORY_ENTRY.size]

    def _allocate(self, size_bytes: int) -> int:
        offset = self.heap.allocate(size_bytes)
        if offset is None:
            raise CommandError(
                Answer.ERR_OUT_OF_MEMORY,
                f"{size_bytes} bytes beside {self.heap.used_bytes} in use exceed {self.heap.size_bytes}",
                Denial.QUOTA,
            )
        return offset

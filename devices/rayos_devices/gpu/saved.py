"""The state that a successor needs beside the heap: scanouts, cursors, the resource records, the damage serial."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from rayos_devices.gpu.resource import MAX_RESOURCES, RECORD_BYTES, ResourceTable
from rayos_devices.gpu.scanout import Scanout, cursor_picture
from rayos_devices.gpu.wire import MAX_SCANOUTS, Rect

#: version, scanouts, damage serial; an entry for each scanout; then the resource records.
_HEADER: Final = struct.Struct("<IIQ")
_VERSION: Final = 2
#: mode's width, height; resource id, rect; cursor resource id, x, y, hot x, hot y, is shown.
_SCANOUT: Final = struct.Struct("<IIIIIIIIIIIIB3x")

#: The longest state.
STATE_BYTES: Final = _HEADER.size + MAX_SCANOUTS * _SCANOUT.size + MAX_RESOURCES * RECORD_BYTES


def pack(scanouts: Sequence[Scanout], table: ResourceTable, serial: int) -> bytes:
    """All of it, at most STATE_BYTES."""
    entries = b"".join(
        _SCANOUT.pack(
            scanout.width,
            scanout.height,
            scanout.resource.resource_id if scanout.resource is not None else 0,
            *scanout.rect,
            scanout.cursor_resource_id,
            scanout.cursor_x,
            scanout.cursor_y,
            scanout.hot_x,
            scanout.hot_y,
            scanout.is_cursor_shown,
        )
        for scanout in scanouts
    )
    return _HEADER.pack(_VERSION, len(scanouts), serial) + entries + table.pack()


def restore(saved: bytes, scanouts: Sequence[Scanout], table: ResourceTable) -> int:
    """Make scanouts and table what they were when `saved` was packed; returns the damage serial of then.

    Errors: ValueError when it was another device: other scanouts, another heap.
    """
    version, count, serial = _HEADER.unpack_from(saved)
    if version != _VERSION or count != len(scanouts):
        raise ValueError(
            f"version {version} with {count} scanouts: version {_VERSION} with {len(scanouts)} is allowed"
        )
    end = _HEADER.size + count * _SCANOUT.size
    table.restore(saved[end:])
    for scanout, entry in zip(scanouts, _SCANOUT.iter_unpack(saved[_HEADER.size : end]), strict=True):
        scanout.width, scanout.height = entry[:2]
        scanout.resource = table.get(entry[2])
        scanout.rect = Rect(*entry[3:7])
        scanout.cursor_resource_id, scanout.cursor_x, scanout.cursor_y = entry[7:10]
        scanout.hot_x, scanout.hot_y = entry[10:12]
        scanout.is_cursor_shown = bool(entry[12])
        shape = table.get(scanout.cursor_resource_id)
        scanout.cursor_pixels = (shape and cursor_picture(shape, table.heap.view)) or b""
    return int(serial)

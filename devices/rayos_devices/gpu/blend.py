"""A cursor over a picture: source-over with premultiplied alpha, as a DRM plane blends without being told otherwise
(Linux, Documentation/gpu/drm-kms.rst, *Plane Composition Properties*)."""

from __future__ import annotations

from rayos_devices.gpu.scanout import Cursor
from rayos_devices.gpu.wire import CURSOR_SIDE, PIXEL_BYTES


def blend(pixels: bytes, width: int, height: int, cursor: Cursor) -> bytes:
    """A BGRX picture of `width` by `height` with the cursor's BGRA picture in it, its corner at the cursor's place.

    The driver's place is a u32 that stands for a signed number: a cursor may hang over any edge.
    """
    left, top = _signed(cursor.x), _signed(cursor.y)
    columns = range(max(0, -left), min(CURSOR_SIDE, width - left))
    rows = range(max(0, -top), min(CURSOR_SIDE, height - top))
    if not columns or not rows:
        return pixels
    out = bytearray(pixels)
    for row in rows:
        source = (row * CURSOR_SIDE + columns.start) * PIXEL_BYTES
        target = ((top + row) * width + left + columns.start) * PIXEL_BYTES
        line = cursor.pixels[source : source + len(columns) * PIXEL_BYTES]
        for at in range(0, len(line), PIXEL_BYTES):
            alpha = line[at + 3]
            if not alpha:
                continue
            for byte in range(at, at + 3):
                under = out[target + byte]
                out[target + byte] = min(255, line[byte] + under * (255 - alpha) // 255)
    return bytes(out)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value

"""A frame as a PNG file (ISO/IEC 15948): truecolour, 8 bits, no filter, no interlace."""

from __future__ import annotations

import struct
import zlib
from typing import Final

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode_png(width: int, height: int, stride: int, pixels: bytes | bytearray | memoryview) -> bytes:
    """The PNG of a BGRX picture (little-endian `x8r8g8b8`, as virtio-gpu's B8G8R8X8).

    Args:
        width: pixels in a row.
        height: rows.
        stride: bytes from one row to the next, at least `4 * width`.
        pixels: at least `stride * height` bytes.

    Raises:
        ValueError: a size is not positive or `pixels` is shorter than the picture.
    """
    if width <= 0 or height <= 0 or stride < 4 * width:
        raise ValueError(f"a picture of {width}x{height} pixels, stride {stride} bytes is not possible")
    if len(pixels) < stride * height:
        raise ValueError(f"{len(pixels)} bytes of pixels, {stride * height} needed for {width}x{height}")
    view = memoryview(pixels)
    raw = bytearray((3 * width + 1) * height)
    row_bytes = 3 * width + 1
    for y in range(height):
        row = bytes(view[y * stride : y * stride + 4 * width])
        rgb = bytearray(3 * width)
        rgb[0::3], rgb[1::3], rgb[2::3] = row[2::4], row[1::4], row[0::4]
        start = y * row_bytes + 1  # byte 0 of a row is its filter: none
        raw[start : start + 3 * width] = rgb
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(raw), 3)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")

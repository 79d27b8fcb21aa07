"""A picture to look at in a test: from our screenshots (PNG) and from QEMU's `screendump` (PPM).

Decodes what those two write: PNG (ISO/IEC 15948) truecolour of 8 bits, every filter, no interlace; PPM `P6`
with a maximum of 255 (netpbm).
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Final

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PPM: Final = re.compile(rb"P6\s+(\d+)\s+(\d+)\s+255\s")


@dataclass(frozen=True, slots=True)
class Picture:
    """`rgb` has three bytes a pixel, row by row."""

    width: int
    height: int
    rgb: bytes

    def pixel(self, x: int, y: int) -> tuple[int, int, int]:
        """(red, green, blue), each 0 to 255."""
        start = 3 * (y * self.width + x)
        red, green, blue = self.rgb[start : start + 3]
        return red, green, blue

    @property
    def sha256(self) -> str:
        """Of its size and pixels, in hexadecimal."""
        return hashlib.sha256(f"{self.width}x{self.height}\n".encode() + self.rgb).hexdigest()

    def crop(self, x: int, y: int, width: int, height: int) -> Picture:
        """A part of it.

        Raises:
            ValueError: that is not inside.
        """
        if not (x >= 0 <= y and width > 0 < height and x + width <= self.width and y + height <= self.height):
            raise ValueError(f"{width}x{height} at {x},{y} is not inside {self.width}x{self.height} pixels")
        rows = (3 * (row * self.width + x) for row in range(y, y + height))
        return Picture(width, height, b"".join(self.rgb[start : start + 3 * width] for start in rows))


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    near_left, near_up, near_corner = abs(guess - left), abs(guess - up), abs(guess - corner)
    if near_left <= near_up and near_left <= near_corner:
        return left
    return up if near_up <= near_corner else corner


def _unfilter(kind: int, row: bytearray, above: bytes) -> None:
    if kind == 2:
        row[:] = bytes((value + up) & 255 for value, up in zip(row, above, strict=True))
    elif kind:
        for index, value in enumerate(row):
            left, corner = (row[index - 3], above[index - 3]) if index >= 3 else (0, 0)
            up = above[index]
            guess = {1: left, 3: (left + up) // 2, 4: _paeth(left, up, corner)}[kind]
            row[index] = (value + guess) & 255


def decode_png(data: bytes) -> Picture:
    """The picture in a PNG file of our own.

    Raises:
        ValueError: it is none, or not 8-bit truecolour.
    """
    if data[:8] != _PNG:
        raise ValueError(f"{data[:8]!r} is not the beginning of a PNG file")
    width = height = 0
    body, position = b"", 8
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height, *form = struct.unpack(">IIBBBBB", chunk)
            if form != [8, 2, 0, 0, 0]:
                raise ValueError(f"a PNG of the form {form}; only 8-bit truecolour is read")
        elif kind == b"IDAT":
            body += chunk
        position += 12 + length
    raw, size = zlib.decompress(body), 3 * width
    above, rows = bytes(size), []
    for y in range(height):
        start = y * (size + 1)
        row = bytearray(raw[start + 1 : start + 1 + size])
        _unfilter(raw[start], row, above)
        above = bytes(row)
        rows.append(above)
    return Picture(width, height, b"".join(rows))


def decode_ppm(data: bytes) -> Picture:
    """The picture in a binary PPM file.

    Raises:
        ValueError: it is none.
    """
    head = _PPM.match(data)
    if head is None:
        raise ValueError(f"{data[:20]!r} is not the beginning of a binary PPM file")
    width, height = int(head[1]), int(head[2])
    rgb = data[head.end() :]
    if len(rgb) != 3 * width * height:
        raise ValueError(f"{len(rgb)} bytes of pixels for {width}x{height}; {3 * width * height} are needed")
    return Picture(width, height, rgb)

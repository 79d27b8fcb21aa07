"""Scanouts: which part of which resource a monitor shows, and the picture as others want it (VIRTIO 1.3, 5.7.6.8).

A picture leaves as BGRX: bytes blue, green, red, unused. Conversion moves whole byte planes by slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rayos_devices.gpu.resource import Resource
from rayos_devices.gpu.wire import CURSOR_SIDE, PIXEL_BYTES, Format, Rect

#: The longest side of a scanout in pixels: a row stays below the display's message size, and QEMU's pixman
#: allows 32767.
MAX_SCANOUT_SIDE: Final = 16384

#: Where blue, green, red and alpha (or the unused byte) lie in a pixel.
_PLANES: Final[dict[Format, tuple[int, int, int, int]]] = {
    Format.B8G8R8A8: (0, 1, 2, 3),
    Format.B8G8R8X8: (0, 1, 2, 3),
    Format.A8R8G8B8: (3, 2, 1, 0),
    Format.X8R8G8B8: (3, 2, 1, 0),
    Format.R8G8B8A8: (2, 1, 0, 3),
    Format.R8G8B8X8: (2, 1, 0, 3),
    Format.X8B8G8R8: (1, 2, 3, 0),
    Format.A8B8G8R8: (1, 2, 3, 0),
}


@dataclass(frozen=True, slots=True)
class ScanoutFrame:
    """A picture: `height` rows of `stride` bytes, pixels BGRX; `serial` rises with every flush that changed it."""

    width: int
    height: int
    stride: int
    pixels: bytes
    serial: int


@dataclass(frozen=True, slots=True)
class Cursor:
    """The cursor plane of a scanout: a 64x64 picture (BGRA). Its upper left corner is at `x`, `y` of the scanout
    (where Linux puts it; u32, negative ones wrapped), and its hot spot is at `hot_x`, `hot_y` of the picture.
    """

    x: int
    y: int
    hot_x: int
    hot_y: int
    pixels: bytes


class Scanout:
    """One monitor, whose mode is `width` by `height` pixels: what it tells the guest, and what the guest may ignore.

    `resource` is None while it is off; `rect` is the part of the resource that it shows.
    """

    __slots__ = (
        "cursor_pixels",
        "cursor_resource_id",
        "cursor_x",
        "cursor_y",
        "height",
        "hot_x",
        "hot_y",
        "index",
        "is_cursor_shown",
        "rect",
        "resource",
        "width",
    )

    def __init__(self, index: int, width: int, height: int) -> None:
        self.index = index
        self.width = width
        self.height = height
        self.switch_off()
        self.hide_cursor()

    def switch_off(self) -> None:
        self.resource: Resource | None = None
        self.rect = Rect(0, 0, 0, 0)

    @property
    def whole(self) -> Rect:
        """The picture, relative to itself; in the mode's size while the scanout is off."""
        width, height = (self.width, self.height) if self.resource is None else self.rect[2:]
        return Rect(0, 0, width, height)

    def hide_cursor(self) -> None:
        self.is_cursor_shown = False
        self.cursor_resource_id = 0
        self.cursor_x = self.cursor_y = self.hot_x = self.hot_y = 0
        self.cursor_pixels = b""

    def visible(self, rect: Rect) -> Rect | None:
        """The part of `rect` (of the resource) that is shown, relative to the scanout; None when nothing is."""
        part = rect.intersection(self.rect)
        return part and Rect(part.x - self.rect.x, part.y - self.rect.y, part.width, part.height)

    def rows(self, pixels: memoryview, rect: Rect) -> list[memoryview | bytes]:
        """The pixels of `rect` (relative to the scanout, inside it) as BGRX in pieces, without a copy where possible.

        `pixels` is the heap. The scanout must be on.
        """
        resource = self.resource
        assert resource is not None
        start = resource.offset + (self.rect.y + rect.y) * resource.stride
        start += (self.rect.x + rect.x) * PIXEL_BYTES
        row = rect.width * PIXEL_BYTES
        pieces: list[memoryview]
        if row == resource.stride:
            pieces = [pixels[start : start + row * rect.height]]
        else:
            end = start + resource.stride * rect.height
            pieces = [pixels[at : at + row] for at in range(start, end, resource.stride)]
        if _PLANES[resource.format][0] == 0:
            return list(pieces)
        return [to_bgra(b"".join(pieces), resource.format)]

    def picture(self, pixels: memoryview) -> bytes:
        """The whole scanout as BGRX."""
        return b"".join(self.rows(pixels, self.whole))


def cursor_picture(resource: Resource, pixels: memoryview) -> bytes | None:
    """A cursor resource as BGRA; None when it is not CURSOR_SIDE pixels square. `pixels` is the heap."""
    if resource.width != CURSOR_SIDE or resource.height != CURSOR_SIDE:
        return None
    data = bytes(pixels[resource.offset : resource.offset + resource.size_bytes])
    return to_bgra(data, resource.format)


def to_bgra(data: bytes, format_: Format) -> bytes:
    """Pixels of any 2D format as bytes blue, green, red, alpha (or whatever was in the unused byte)."""
    planes = _PLANES[format_]
    if planes == (0, 1, 2, 3):
        return data
    out = bytearray(len(data))
    for to, source in enumerate(planes):
        out[to::PIXEL_BYTES] = data[source::PIXEL_BYTES]
    return bytes(out)

"""PNG files that any reader takes, with the colours in the right order."""

from __future__ import annotations

import struct
import zlib

import pytest

from rayos_vmm.machine.png import encode_png


def test_a_picture_keeps_its_colours_and_ignores_the_padding() -> None:
    """BGRX in, RGB out, row by row, whatever the stride."""
    stride = 4 * 2 + 3
    rows = [b"\x01\x02\x03\xff\x04\x05\x06\x00" + b"pad", b"\x07\x08\x09\x00\x0a\x0b\x0c\x00" + b"pad"]
    png = encode_png(2, 2, stride, b"".join(rows))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    position, chunks = 8, {}
    while position < len(png):
        (size,) = struct.unpack_from(">I", png, position)
        kind, data = png[position + 4 : position + 8], png[position + 8 : position + 8 + size]
        (checksum,) = struct.unpack_from(">I", png, position + 8 + size)
        assert checksum == zlib.crc32(kind + data)
        chunks[kind] = data
        position += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (2, 2, 8, 2, 0, 0, 0)
    assert zlib.decompress(chunks[b"IDAT"]) == bytes.fromhex("00030201060504000908070c0b0a")


def test_an_impossible_picture_is_refused() -> None:
    """Sizes are checked before anything is read."""
    with pytest.raises(ValueError, match="15 bytes of pixels, 16 needed"):
        encode_png(2, 2, 8, b"x" * 15)
    with pytest.raises(ValueError, match="not possible"):
        encode_png(2, 2, 7, b"x" * 100)

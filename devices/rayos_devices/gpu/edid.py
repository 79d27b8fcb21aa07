"""The monitor that a guest sees, as EDID. An EDID 1.4 base block has the chosen mode (VESA E-EDID Standard, release
A2); extension blocks have the other modes that it can do (CTA-861, 7.5: timings alone, no data blocks).

The preferred mode is a detailed timing with reduced blanking (VESA CVT 1.2, 5.3: 160 pixels, 460 us). A detailed
timing has 12 bits a side and a 16-bit clock in units of 10 kHz, which bounds what can be chosen.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

BLOCK_BYTES: Final = 128
#: 12 bits in a detailed timing descriptor.
MAX_SIDE: Final = 4095

#: Detailed timings that one extension block holds: (127 - 4) // 18.
_TIMINGS: Final = 6
#: Extension blocks of an EDID answer's 1024 bytes that are used at most.
_MAX_EXTENSIONS: Final = 3
#: Modes beside the chosen one.
MAX_MODES: Final = _TIMINGS * _MAX_EXTENSIONS

_HEADER: Final = bytes.fromhex("00ffffffffffff00")
_HORIZONTAL_BLANK: Final = 160
_HORIZONTAL_FRONT: Final = 48
_HORIZONTAL_SYNC: Final = 32
_VERTICAL_FRONT: Final = 3
_VERTICAL_SYNC: Final = 10
_VERTICAL_BLANK_US: Final = 460
_REFRESH_HZ: Final = 60
_MAX_CLOCK: Final = 0xFFFF
#: 3.8: 640x480, 800x600 and 1024x768 at 60 Hz.
_ESTABLISHED: Final = bytes((0b0010_0001, 0b0000_1000, 0))
#: 3.9: eight modes at 60 Hz, those of QEMU's own EDID among them that can be said so.
_STANDARD: Final = (
    (1280, 720),
    (1280, 1024),
    (1440, 900),
    (1600, 1200),
    (1680, 1050),
    (1920, 1080),
    (1920, 1200),
    (2048, 1152),
)
#: 3.9: aspect ratio (width times 60 by height) and its two bits.
_ASPECTS: Final = {96: 0, 80: 1, 75: 2, 106: 3}
#: Assumed dot pitch: 100 dots an inch, what desktops take for an ordinary monitor.
_DOTS_PER_INCH: Final = 100

_DESCRIPTOR_NAME: Final = 0xFC
_DESCRIPTOR_RANGE: Final = 0xFD
_DESCRIPTOR_DUMMY: Final = 0x10


def build(
    width: int, height: int, modes: Sequence[tuple[int, int]] = (), *, name: str = "RayOS", serial: int = 1
) -> bytes:
    """The blocks for a monitor whose preferred mode is `width` by `height` pixels (1 to MAX_SIDE each).

    `modes` (at most MAX_MODES) are what it can do beside it; without any, those that every monitor can. Errors:
    ValueError for a mode that cannot be said, or too many of them.
    """
    for mode in ((width, height), *modes):
        if not all(1 <= side <= MAX_SIDE for side in mode):
            raise ValueError(f"a mode of {mode[0]}x{mode[1]}: 1 to {MAX_SIDE} pixels a side are allowed")
    if len(modes) > MAX_MODES:
        raise ValueError(f"{len(modes)} modes: at most {MAX_MODES} are allowed")
    width_mm, height_mm = (max(1, side * 254 // (_DOTS_PER_INCH * 10)) for side in (width, height))
    timings = [_detailed_timing(*mode, width_mm, height_mm) for mode in modes if mode != (width, height)]
    extensions = [timings[at : at + _TIMINGS] for at in range(0, len(timings), _TIMINGS)]
    block = bytearray(BLOCK_BYTES)
    block[0:8] = _HEADER
    # 3.4: manufacturer "RAY", product 1, serial, week 0, year 2026
    struct.pack_into(">H", block, 8, _manufacturer("RAY"))
    struct.pack_into("<HIBB", block, 10, 1, serial, 0, 2026 - 1990)
    block[18:20] = b"\x01\x04"
    # 3.6: digital, 8 bits a colour, DisplayPort; size in cm; gamma 2.2; sRGB, preferred timing is native
    block[20:25] = bytes(
        (0b10100101, min(255, max(1, width_mm // 10)), min(255, max(1, height_mm // 10)), 120, 0x06)
    )
    block[25:35] = bytes.fromhex("ee91a3544c99260f5054")  # 3.7: the sRGB primaries
    block[35:38] = bytes(3) if modes else _ESTABLISHED
    block[38:54] = b"\x01\x01" * 8 if modes else b"".join(map(_standard_timing, _STANDARD))
    block[54:72] = _detailed_timing(width, height, width_mm, height_mm)
    block[72:90] = _text(_DESCRIPTOR_NAME, name)
    block[90:108] = _range_limits()
    block[108:126] = bytes((0, 0, 0, _DESCRIPTOR_DUMMY, 0)) + bytes(13)
    block[126] = len(extensions)
    block[127] = -sum(block) & 0xFF
    return bytes(block) + b"".join(map(_extension, extensions))


def _extension(timings: list[bytes]) -> bytes:
    """CTA-861, 7.5: tag 2, revision 3, the timings begin at byte 4; none of them native."""
    block = bytearray(bytes((2, 3, 4, 0)) + b"".join(timings)).ljust(BLOCK_BYTES, b"\0")
    block[127] = -sum(block) & 0xFF
    return bytes(block)


def _standard_timing(mode: tuple[int, int]) -> bytes:
    width, height = mode
    return bytes((width // 8 - 31, _ASPECTS[60 * width // height] << 6 | _REFRESH_HZ - 60))


def _manufacturer(letters: str) -> int:
    """Three letters of five bits (3.4.1)."""
    first, second, third = (ord(letter) - ord("A") + 1 for letter in letters)
    return first << 10 | second << 5 | third


def _detailed_timing(width: int, height: int, width_mm: int, height_mm: int) -> bytes:
    """3.10.2."""
    refresh = _REFRESH_HZ
    while True:
        lines_per_us = height * refresh / (1_000_000 - _VERTICAL_BLANK_US * refresh)
        blank = max(_VERTICAL_FRONT + _VERTICAL_SYNC + 6, int(_VERTICAL_BLANK_US * lines_per_us) + 1)
        clock = (width + _HORIZONTAL_BLANK) * (height + blank) * refresh // 10_000
        if clock <= _MAX_CLOCK:
            break
        refresh -= 1
    return struct.pack(
        "<H16B",
        clock,
        width & 0xFF,
        _HORIZONTAL_BLANK & 0xFF,
        width >> 8 << 4 | _HORIZONTAL_BLANK >> 8,
        height & 0xFF,
        blank & 0xFF,
        height >> 8 << 4 | blank >> 8,
        _HORIZONTAL_FRONT,
        _HORIZONTAL_SYNC,
        _VERTICAL_FRONT << 4 | _VERTICAL_SYNC,
        0,
        width_mm & 0xFF,
        height_mm & 0xFF,
        width_mm >> 8 << 4 | height_mm >> 8,
        0,
        0,
        0b00011010,  # digital separate sync, horizontal positive (reduced blanking)
    )


def _text(tag: int, text: str) -> bytes:
    """3.10.3: at most 13 characters, ended by a line feed when shorter."""
    data = text.encode("ascii", "replace")[:13]
    if len(data) < 13:
        data = (data + b"\n").ljust(13, b" ")
    return bytes((0, 0, 0, tag, 0)) + data


def _range_limits() -> bytes:
    """3.10.3.3.1: 1 to 120 Hz, 1 to 255 kHz, up to 660 MHz; the timings above are all there is (no formula)."""
    return bytes((0, 0, 0, _DESCRIPTOR_RANGE, 0, 1, 120, 1, 255, 66, 0x01, 0x0A)) + b" " * 6

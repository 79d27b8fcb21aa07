"""Quantities with their unit written out: `256MiB`, `100Mbit/s`, `1.5s`.

Invariant: a quantity is never a bare number, so nobody has to know whether `memory = 256` meant bytes
or mebibytes. Sizes are binary (IEC 80000-13), rates decimal (as network people count), times decimal.

Sizes are also read as QEMU and docker spell them, `128M` and `1g`. What is printed is in our spelling.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from msgspec import Meta

SIZE_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
RATE_UNITS: Final = {"bit/s": 1, "kbit/s": 10**3, "Mbit/s": 10**6, "Gbit/s": 10**9}
TIME_UNITS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
#: QEMU's and docker's letters.
_LETTERS: Final = {"K": "KiB", "M": "MiB", "G": "GiB", "T": "TiB"}

_NUMBER: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)(.*)", re.DOTALL)

SIZE_PATTERN: Final = r"^[0-9]{1,15}(B|KiB|MiB|GiB|TiB|[KMGTkmgt])$"
RATE_PATTERN: Final = r"^[0-9]{1,15}(bit/s|kbit/s|Mbit/s|Gbit/s)$"
THROUGHPUT_PATTERN: Final = r"^[0-9]{1,15}(B|KiB|MiB|GiB|TiB)/s$"
TIME_PATTERN: Final = r"^[0-9]{1,15}([.][0-9]{1,6})?(ms|s|min|h|d)$"

Size = Annotated[str, Meta(pattern=SIZE_PATTERN, description="size with its unit", examples=["256MiB"])]
Rate = Annotated[str, Meta(pattern=RATE_PATTERN, description="rate with its unit", examples=["100Mbit/s"])]
Throughput = Annotated[
    str, Meta(pattern=THROUGHPUT_PATTERN, description="bytes a second with their unit", examples=["50MiB/s"])
]
Duration = Annotated[str, Meta(pattern=TIME_PATTERN, description="time with its unit", examples=["1.5s"])]


def _parse(text: str, units: dict[str, int] | dict[str, float], what: str, *, whole: bool) -> float:
    match = _NUMBER.fullmatch(text)
    example = f"a {what} is a number and one of {', '.join(units)}"
    if match is None:
        raise ValueError(f"{text!r} is not a {what}: {example}")
    number, unit = match.groups()
    if unit not in units:
        seen = f"unit {unit!r}" if unit else "no unit"
        raise ValueError(f"{text!r} has {seen}: {example}")
    if whole and "." in number:
        raise ValueError(f"{text!r} is not a whole number: {example}")
    return (int(number) if whole else float(number)) * units[unit]


def parse_size(text: str) -> int:
    """The bytes in `256MiB`, or in `256M`.

    Raises:
        ValueError: no unit, an unknown one, or not a whole number.
    """
    return int(_parse(spell_size(text), SIZE_UNITS, "size", whole=True))


def spell_size(text: str) -> str:
    """`256M` and `256m` as `256MiB`; any other text as it is."""
    unit = _LETTERS.get(text[-1:].upper())
    return f"{text[:-1]}{unit}" if unit is not None and text[:-1].isdecimal() else text


def parse_rate(text: str) -> int:
    """The bits per second in `100Mbit/s`.

    Raises:
        ValueError: no unit, an unknown one, or not a whole number.
    """
    return int(_parse(text, RATE_UNITS, "rate", whole=True))


def parse_throughput(text: str) -> int:
    """The bytes per second in `50MiB/s`.

    Raises:
        ValueError: no unit, an unknown one, or not a whole number.
    """
    units = {f"{unit}/s": scale for unit, scale in SIZE_UNITS.items()}
    return int(_parse(text, units, "throughput", whole=True))


def parse_duration(text: str) -> float:
    """The seconds in `1.5s`.

    Raises:
        ValueError: no unit or an unknown one.
    """
    return _parse(text, TIME_UNITS, "time", whole=False)


def format_rate(bits_per_second: int) -> str:
    """The largest unit that leaves a whole number: `10000000` is `10Mbit/s`."""
    for unit, scale in reversed(RATE_UNITS.items()):
        if bits_per_second % scale == 0 and bits_per_second >= scale:
            return f"{bits_per_second // scale}{unit}"
    return f"{bits_per_second}bit/s"


def format_size(size_bytes: int) -> str:
    """The largest unit that leaves a whole number: `268435456` is `256MiB`."""
    for unit, scale in reversed(SIZE_UNITS.items()):
        if size_bytes % scale == 0 and size_bytes >= scale:
            return f"{size_bytes // scale}{unit}"
    return f"{size_bytes}B"

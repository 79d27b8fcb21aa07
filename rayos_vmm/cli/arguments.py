"""Argument types with units, and errors in the units' words."""

from __future__ import annotations

import argparse

from rayos_vmm.config.units import parse_duration, parse_size, spell_size


def duration(text: str) -> float:
    """`1.5s`, `2min`, `2`: seconds."""
    try:
        # A bare number is seconds, as for `sleep` and `timeout`.
        seconds = parse_duration(f"{text}s" if text.replace(".", "", 1).isdecimal() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time at all")
    return seconds


def size(text: str) -> str:
    """`256MiB`, checked; `256M` becomes that."""
    try:
        parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return spell_size(text)

"""Quantities are written with their unit, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from rayos_vmm.config.units import (
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
    parse_throughput,
    spell_size,
)


def test_units_scale_as_their_names_say() -> None:
    """Sizes are binary, rates decimal, times decimal."""
    assert parse_size("256MiB") == 256 * 1024 * 1024
    assert parse_size("512B") == 512
    assert parse_size("128M") == parse_size("128m") == 128 << 20 and parse_size("1G") == 1 << 30
    assert spell_size("128m") == "128MiB" and spell_size("512B") == "512B"
    assert parse_rate("100Mbit/s") == 100_000_000
    assert parse_throughput("50MiB/s") == 50 << 20
    assert parse_duration("1.5s") == 1.5
    assert parse_duration("2min") == 120


@pytest.mark.parametrize("text", ["256", "256MB", "256 MiB", "MiB", "-1MiB", "1.5MiB", "", "1e3MiB", "1MiB "])
def test_a_size_without_a_known_unit_is_refused_with_the_units(text: str) -> None:
    """The message shows what was seen and which units there are."""
    with pytest.raises(ValueError, match=r"MiB.*GiB") as refused:
        parse_size(text)
    assert repr(text) in str(refused.value)


def test_sizes_are_shown_in_their_largest_whole_unit() -> None:
    """A size as shown can be typed back."""
    for size in (1, 512, 1536, 1 << 20, 3 << 30, (1 << 40) + 1):
        assert parse_size(format_size(size)) == size
    assert format_size(256 << 20) == "256MiB"

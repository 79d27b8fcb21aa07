"""Output with times: an asciicast holds it byte for byte, stamps stand before every line."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from rayos_vmm.cli.cast import Asciicast, Stamps
from rayos_vmm.shared.timed import Span, cut


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.floats(0, 5)), max_size=12))
def test_an_asciicast_is_the_output_byte_for_byte(arrivals: list[tuple[bytes, float]]) -> None:
    """Whatever bytes, wherever they were cut; times only rise, and every line is JSON of version 2."""
    cast, out, now, offset = Asciicast("dev", 132, 43), b"", 1.7e9, 0
    for data, pause in arrivals:
        now += pause
        out += cast.feed(Span(offset=offset, time=now, data=data))
        offset += len(data)
    out += cast.finish()
    whole = b"".join(data for data, _ in arrivals)
    if not whole:
        assert out == b""
        return
    head, *moments = [json.loads(line) for line in out.splitlines()]
    assert (head["version"], head["width"], head["height"]) == (2, 132, 43)
    assert b"".join(text.encode("utf-8", "surrogateescape") for _, _, text in moments) == whole
    times = [at for at, _, _ in moments]
    assert times == sorted(times) and all(kind == "o" for _, kind, _ in moments)


def test_a_character_in_two_pieces_is_one_moment() -> None:
    cast = Asciicast("dev")
    euro = "€".encode()
    assert b'"o"' not in cast.feed(Span(offset=0, time=5.0, data=euro[:2]))
    assert json.loads(cast.feed(Span(offset=2, time=5.5, data=euro[2:]))) == [0.5, "o", "€"]


def test_stamps_stand_before_lines() -> None:
    stamps = Stamps()
    out = stamps.feed(Span(offset=0, time=0.001, data=b"one\ntw")) + stamps.feed(
        Span(offset=6, time=61.5, data=b"o\nx")
    )
    assert out == (b"1970-01-01T00:00:00.001Z one\n1970-01-01T00:00:00.001Z two\n1970-01-01T00:01:01.500Z x")


def test_pieces_are_cut_where_marks_are() -> None:
    """All bytes, in order; what is older than the first mark has its time."""
    marks = [(12, 2_000_000_000), (15, 3_000_000_000), (99, 4_000_000_000)]
    assert [(p.offset, p.time, p.data) for p in cut(10, b"abcdefgh", marks)] == [
        (10, 2.0, b"ab"),
        (12, 2.0, b"cde"),
        (15, 3.0, b"fgh"),
    ]
    assert list(cut(10, b"", marks)) == []

"""Text in a console's bytes is found whatever colours, line ends and chunks it came in."""

from __future__ import annotations

import time

import pytest

from rayos_vmm.errors import Invalid
from rayos_vmm.shared.console_text import Finder, Folder, compile_pattern

RAW = b"\x1b[32mOK\x1b[0m\r\r\ncaf\xc3\xa9 \xe2\x9c\x93\n"
RAW += b"\x1b]0;title\x07login: \x1b(Bx\rover\x1b[1;31mKER\x1b[0mNEL\r\n"
TEXT = "OK\ncafé ✓\nlogin: x\noverKERNEL\n"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_the_text_is_the_same_for_every_chunk_size(size: int) -> None:
    folder = Folder()
    assert "".join(folder.feed(RAW[at : at + size]) for at in range(0, len(RAW), size)) == TEXT


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("pattern", ["^OK$", "é ✓", "^login: ", "overKERNEL", r"OK\ncaf"])
def test_a_pattern_is_found_across_chunks(pattern: str, size: int) -> None:
    finder = Finder(["never", pattern])
    found = [finder.feed(RAW[at : at + size]) for at in range(0, len(RAW), size)]
    first = next(one for one in found if one is not None)
    assert first.pattern == pattern


def test_the_match_that_ends_first_wins_and_has_its_line() -> None:
    found = Finder(["second", "first"]).feed(b"1: the first\n2: the second\n")
    assert found is not None
    assert (found.pattern, found.text, found.line) == ("first", "first", "1: the first")


def test_neither_a_long_text_nor_a_cruel_pattern_takes_long() -> None:
    """100 MB are searched with bounded memory; what takes a backtracking engine for ever is linear."""
    finder = Finder(["^MARK2$", r"(a+)+b$"])
    chunk = (b"a" * 80 + b"\r\n") * 800
    began = time.process_time()
    for _ in range(100_000_000 // len(chunk)):
        assert finder.feed(chunk) is None
    assert len(finder._kept) <= 4096
    assert finder.feed(b"MAR") is None
    assert finder.feed(b"K2\r\n") is not None
    assert time.process_time() - began < 60


def test_an_endless_sequence_is_held_back_no_longer_than_allowed() -> None:
    folder = Folder()
    text = "".join(folder.feed(b"\x1b]" + b"x" * 500) for _ in range(20))
    assert len(folder._rest) <= 1024
    assert text.count("x") > 5000


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(Invalid, match="missing"):
        compile_pattern("(")
    with pytest.raises(Invalid, match="look-around"):
        try:
            compile_pattern("(?=a)")
        except Invalid as error:
            raise Invalid(error.hint) from None

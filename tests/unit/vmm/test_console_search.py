"""`expect` looks at each byte a bounded number of times, and knows where in the stream its match ended."""

from __future__ import annotations

import re
import time

import pytest

from rayos_vmm.testing.console import _Window, to_pattern

RAW = b"\x1b[32mO\x1b[0mK\r\r\ncaf\xc3\xa9 and more\r\nlogin: "


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize(("wanted", "rest"), [("OK", b"\r\r\n"), ("é and", b" more"), ("login: ", b"")])
def test_the_offset_is_of_the_bytes_and_not_of_the_text(wanted: str, rest: bytes, size: int) -> None:
    window, found = _Window(to_pattern(wanted), 0), None
    for at in range(0, len(RAW), size):
        found = found or window.feed(RAW[at : at + size], at)
    assert found is not None
    assert RAW[found[1] :].lstrip(b"\x1b[0m").startswith(rest)
    assert found[0][0] == wanted


def test_100_mb_are_searched_in_linear_time_and_bounded_memory() -> None:
    window, chunk = _Window(re.compile("MARK[0-9]$", re.MULTILINE), 0), (b"x" * 62 + b"\r\n") * 1024
    began, offset = time.process_time(), 0
    while offset < 100_000_000:
        assert window.feed(chunk, offset) is None
        offset += len(chunk)
    assert len(window._kept) < 4 * len(chunk)
    found = window.feed(b"MARK2\r\n", offset)
    assert found is not None and found[1] == offset + 5
    assert time.process_time() - began < 60

"""Console output as text to search: control sequences and carriage returns folded away, whatever the chunks were.

Theory of operation: `Folder` turns bytes into text and holds back what may go on in the next chunk (an unfinished
escape sequence, a carriage return, half a UTF-8 character). `Finder` looks for patterns in that text. It keeps the last
`OVERLAP_CHARACTERS`, so each character is looked at a bounded number of times and a match may lie across any border.
Sequences are those of ECMA-48, 5.4 (CSI), 5.6 (OSC and the other strings) and 5.5 (two characters).

Patterns are RE2's: a guest decides what they are matched against, and RE2 needs linear time for any text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import re2

from rayos_vmm.errors import Invalid

#: A match that is longer than this may be missed where two chunks meet.
OVERLAP_CHARACTERS: Final = 4096
PATTERN_MEMORY_BYTES: Final = 4 << 20
#: An escape sequence that does not end within so many bytes is text.
SEQUENCE_MAXIMUM_BYTES: Final = 1024
LINE_SHOWN_CHARACTERS: Final = 200

_SEQUENCE: Final = (
    rb"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI
    rb"|\x1b[\]PX^_][^\x07\x1b]{0,1024}(?:\x07|\x1b\\)"  # OSC, DCS, SOS, PM, APC
    rb"|\x1b[ -/]*[0-OQ-WYZ\\`-~]"  # two characters, with intermediates
)
_REMOVED: Final = re.compile(_SEQUENCE + rb"|\r+(?=\n)|\x00")
_UNFINISHED: Final = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)?\Z|\r+\Z", re.DOTALL
)


def fold(data: bytes) -> bytes:
    """Complete output without control sequences; CR before LF goes, any other CR is a line end."""
    return _REMOVED.sub(b"", data).replace(b"\r", b"\n") if b"\x1b" in data or b"\r" in data else data


def complete_bytes(data: bytes) -> int:
    """How much of `data` cannot be changed by what follows: without a sequence, CR or character that is unfinished."""
    tail = _UNFINISHED.search(data, max(0, len(data) - SEQUENCE_MAXIMUM_BYTES))
    cut = len(data) if tail is None else tail.start()
    for back in range(1, min(4, cut) + 1):  # RFC 3629, 3: a lead byte tells how many follow
        byte = data[cut - back]
        if byte & 0xC0 != 0x80:
            needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return cut - back if needed > back else cut
    return cut


class Folder:
    """One stream of bytes as text."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> str:
        """The text that `data` completes."""
        data = self._rest + data
        cut = complete_bytes(data)
        self._rest = data[cut:]
        return fold(data[:cut]).decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Found:
    """A match: which pattern, its text, and the line that it is in."""

    pattern: str
    text: str
    line: str


def compile_pattern(pattern: str) -> re2._Regexp[str]:
    """A pattern in RE2's syntax; `^` and `$` match at every line.

    Raises:
        Invalid: it is none.
    """
    options = re2.Options()
    options.max_mem = PATTERN_MEMORY_BYTES
    options.log_errors = False
    try:
        return re2.compile(f"(?m){pattern}", options=options)
    except re2.error as error:
        said = error.args[0].decode(errors="replace") if error.args else "it cannot be compiled"
        raise Invalid(
            f"{pattern!r} is not a pattern: {said}",
            hint="patterns are RE2's (github.com/google/re2/wiki/Syntax): no look-around, no back-references",
        ) from None


class Finder:
    """The first match of any of some patterns in one stream.

    Raises:
        Invalid: a pattern is none.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [(pattern, compile_pattern(pattern)) for pattern in patterns]
        self._folder = Folder()
        self._kept = ""

    def feed(self, data: bytes) -> Found | None:
        """The match that ends first in the text up to and with `data`; None when there is none yet."""
        if not self._patterns:
            return None
        text = self._kept + self._folder.feed(data)
        matches = [
            (match.end(), match.start(), pattern)
            for pattern, compiled in self._patterns
            if (match := compiled.search(text)) is not None
        ]
        if matches:
            end, start, pattern = min(matches)
            return Found(pattern, text[start:end], _line(text, start))
        self._kept = text[-OVERLAP_CHARACTERS:]
        if len(text) > len(self._kept):  # `^` must not match where a line was cut
            self._kept = self._kept[self._kept.find("\n") + 1 :]
        return None


def _line(text: str, at: int) -> str:
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    return text[start : end if end >= 0 else len(text)].strip()[:LINE_SHOWN_CHARACTERS]

"""A console's output with its times, for people and for players: lines with stamps, asciicast version 2.

An asciicast is one JSON object, then a JSON array a moment: seconds, "o", text (asciinema, doc/asciicast-v2). Its text
is UTF-8 cut at characters; a byte that is none stands there as a lone surrogate, so that joining all texts and encoding
them with `surrogateescape` gives the output byte for byte.
"""

from __future__ import annotations

import codecs
import json
import time
from typing import Final

from rayos_vmm.shared.timed import Span

DEFAULT_SIZE: Final = (80, 24)


class Asciicast:
    """`feed` pieces in their order, then `finish`; both return what to write."""

    def __init__(self, title: str, columns: int = 0, rows: int = 0) -> None:
        self._title = title
        self._size = (columns, rows) if columns and rows else DEFAULT_SIZE
        self._started: float | None = None
        self._now = 0.0
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode

    def feed(self, piece: Span) -> bytes:
        head = b""
        if self._started is None:
            self._started = piece.time
            columns, rows = self._size
            head = _line(
                {
                    "version": 2,
                    "width": columns,
                    "height": rows,
                    "timestamp": int(piece.time),
                    "title": self._title,
                }
            )
        self._now = max(self._now, round(piece.time - self._started, 6))
        return head + self._moment(self._decode(piece.data))

    def finish(self) -> bytes:
        """Returns the rest of an unfinished character at the end."""
        return self._moment(self._decode(b"", True))

    def _moment(self, text: str) -> bytes:
        return _line([self._now, "o", text]) if text else b""


def _line(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode() + b"\n"


class Stamps:
    """Every line begins with the time at which its first byte came; UTC, milliseconds."""

    def __init__(self) -> None:
        self._is_begun = False

    def feed(self, piece: Span) -> bytes:
        seconds, fraction = divmod(round(piece.time * 1000), 1000)
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{fraction:03}Z ".encode()
        out = b""
        for line in piece.data.splitlines(keepends=True) if b"\n" in piece.data else [piece.data]:
            out += line if self._is_begun else stamp + line
            self._is_begun = not line.endswith(b"\n")
        return out

    def finish(self) -> bytes:
        return b""

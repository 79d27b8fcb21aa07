"""The output of a command: JSON or words for the result, errors and progress on the other stream."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class Output:
    """Where and how a command speaks. `is_json`: the result is one JSON value a line, nothing else."""

    is_json: bool = False

    def result(self, value: Any, text: str | None = None) -> None:
        """The result: `value` as JSON, or `text` (nothing when None)."""
        if self.is_json:
            self.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
        elif text is not None:
            self.write(f"{text}\n".encode())

    def line(self, value: Any, text: str) -> None:
        """One of many results: `value` as JSON on one line, or `text`."""
        self.write((msgspec.json.encode(value) if self.is_json else text.encode()) + b"\n")

    def table(self, value: Any, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The result as a table of columns, or as JSON."""
        self.result(value, render_table(header, rows))

    def note(self, text: str) -> None:
        """Something for people alone, beside the result."""
        if not self.is_json:
            print(text, file=sys.stderr, flush=True)

    def error(self, code: str, message: str, hint: str) -> None:
        """Why the command failed, and what to do."""
        if self.is_json:
            value = {"error": {"code": code, "message": message, "hint": hint}}
            print(msgspec.json.encode(value).decode(), file=sys.stderr, flush=True)
            return
        print(f"rayos: {message}", file=sys.stderr)
        if hint:
            print(f"  try: {hint}", file=sys.stderr)
        sys.stderr.flush()

    def write(self, data: bytes) -> None:
        """Bytes to standard output, all of them."""
        sys.stdout.flush()
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of (path, value)."""
    if isinstance(value, dict) and value:
        pairs: list[tuple[str, Any]] = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return [(prefix, "-" if value in ("", None, [], {}) else str(value))]
    return [row for key, inner in pairs for row in flatten(inner, f"{prefix}.{key}" if prefix else key)]

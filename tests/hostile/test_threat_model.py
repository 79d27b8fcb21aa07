"""docs/threat-model.md says which test stands behind each row: every row has one, and each exists."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The rows of rings, protocol and devices, which the suite must have.
ROWS = [
    *(f"V{n}" for n in range(1, 16)),
    *(f"U{n}" for n in range(1, 11)),
    *(f"B{n}" for n in range(1, 6)),
    *(f"N{n}" for n in range(1, 6)),
    *(f"G{n}" for n in range(1, 9)),
    "I1",
    "C1",
    "E1",
]
ROW = re.compile(r"^\| ([A-Z]\d+) \|.*\| ([^|]*) \|$", re.MULTILINE)
TEST = re.compile(r"`([^`]+\.py)::([^`]+)`")


def rows() -> dict[str, list[tuple[str, str]]]:
    """Row -> its tests as (file, pattern)."""
    text = (ROOT / "docs" / "threat-model.md").read_text()
    return {row: TEST.findall(tests) for row, tests in ROW.findall(text)}


@cache
def names(path: str) -> list[str]:
    """Functions and classes at the top of a test file."""
    tree = ast.parse((ROOT / path).read_bytes())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]


def test_every_row_has_a_test() -> None:
    """No row without one, and no row without its line."""
    missing = [row for row in ROWS if not rows().get(row)]
    assert missing == []
    assert all(rows().values())


def test_every_named_test_exists() -> None:
    """A renamed test takes its row along."""
    wrong = [
        f"{row}: {path}::{pattern}"
        for row, tests in rows().items()
        for path, pattern in tests
        if not (ROOT / path).is_file() or not any(fnmatchcase(name, pattern) for name in names(path))
    ]
    assert wrong == []


def test_attacks_on_rings_are_all_run() -> None:
    """An attack that is in no list would look like a test and be none."""
    path = "tests/hostile/test_ring.py"
    attacks = {name for name in names(path) if re.match(r"V\d+_", name)}
    tree = ast.parse((ROOT / path).read_bytes())
    listed = {
        element.id
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.List)
        for element in node.value.elts
        if isinstance(element, ast.Name)
    }
    assert attacks == listed

"""The documents name files, types and commands that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    *(f"docs/{name}" for name in ("python.md", "testing.md", "threat-model.md", "migrating.md")),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "devices").rglob("README.md")),
)
#: A path in backticks: with a folder, or a file of ours; not a pattern, a placeholder or a path of the host.
_PATH = re.compile(r"`((?:[a-z_.]+/)+[A-Za-z_.-]+\.(?:py|md|toml|c)|(?:[a-z_]+/)+)`")
#: Paths of QEMU's sources, and what a test run leaves.
_OTHERS = ("hw/", "docs/interop/", "artifacts/")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


@cache
def files() -> frozenset[str]:
    """Every file and folder of ours, by each ending of its path."""
    found: set[str] = set()
    for folder in ("rayos_vmm", "devices", "net", "tpm", "images", "tests", "docs", "benchmarks", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if "__pycache__" in parts or "_compiled" in parts:
                continue
            for start in range(len(parts)):
                found.add("/".join(parts[start:]) + ("/" if path.is_dir() else ""))
    return frozenset(
        found
        | {
            f"{name}/"
            for name in ("rayos_vmm", "devices", "net", "tpm", "images", "tests", "docs", "benchmarks")
        }
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document: str) -> None:
    """A path in backticks or behind a link leads somewhere."""
    text = (ROOT / document).read_text()
    home = (ROOT / document).parent
    missing = [
        path
        for path in _PATH.findall(text)
        if not path.startswith(_OTHERS) and path not in files() and not (home / path).exists()
    ]
    missing += [link for link in _LINK.findall(text) if not (home / link).exists()]
    assert missing == []


def test_central_types_are_where_the_architecture_says() -> None:
    """The table of central types: each row names a file and a class in it."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `([A-Z][A-Za-z]+)` \| `([a-z_/]+\.py)` \|", text, re.MULTILINE)
    assert len(rows) >= 20
    for name, file in rows:
        tree = ast.parse((ROOT / file).read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        assert name in names, f"{file} has no class {name}"

"""The examples of README.md and docs/testing.md are tests that pass, word for word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.guest, pytest.mark.root]

ROOT = Path(__file__).parents[2]


def example(document: str) -> Any:
    """The test in the document's first block of Python."""
    path = ROOT / document
    match = re.search(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert match is not None, f"{document} shows no example"
    shown: dict[str, Any] = {}
    exec(compile(match[1], str(path), "exec"), shown)  # noqa: S102  (our own document)
    (test,) = (value for name, value in shown.items() if name.startswith("test_"))
    return test


test_the_readme = example("README.md")
test_the_guide = example("docs/testing.md")

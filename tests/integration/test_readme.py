"""The README's example is a test that passes, word for word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.guest, pytest.mark.root]

README = Path(__file__).parents[2] / "README.md"
_match = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
assert _match is not None, "the README shows no example"
_shown: dict[str, Any] = {}
exec(compile(_match[1], str(README), "exec"), _shown)  # noqa: S102  (our own README)

test_disk_survives_a_reset = _shown["test_disk_survives_a_reset"]

"""A disk in a few words, for commands and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayos_vmm.config.disk_words import parse_disk


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("64MiB", {"size": "64MiB"}),
        ("64m", {"size": "64MiB"}),
        ("./os.img", {"path": "./os.img"}),
        (
            "./os.qcow2,snapshot,bus=ide",
            {"path": "./os.qcow2", "format": "qcow2", "snapshot": True, "bus": "ide"},
        ),
        ("./os.qcow2,format=raw,read-only", {"path": "./os.qcow2", "format": "raw", "read_only": True}),
        ("fat:esp/,cache=unsafe", {"directory": "esp/", "cache": "unsafe"}),
        (
            "8MiB,bus=nvme,logical-block-size=4096",
            {"size": "8MiB", "bus": "nvme", "logical_block_size": 4096},
        ),
    ],
)
def test_a_disk_is_a_size_a_file_or_a_directory_and_its_keys(text: str, table: dict[str, Any]) -> None:
    """The table is what TOML would say."""
    assert parse_disk(text) == table


def test_a_file_may_have_a_comma_and_wrong_words_are_told(tmp_path: Path) -> None:
    """A path that exists is a path."""
    path = tmp_path / "a,b.img"
    path.touch()
    assert parse_disk(str(path)) == {"path": str(path)}
    with pytest.raises(ValueError, match=r"'speed=9' is none of snapshot, .*bus="):
        parse_disk("8MiB,speed=9")
    with pytest.raises(ValueError, match="no such file"):
        parse_disk("disk8")

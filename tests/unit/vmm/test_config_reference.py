"""docs/config.md is made from the structs that read configuration, and docs/example.toml is such a file."""

from __future__ import annotations

from pathlib import Path

from rayos_vmm.config.load import load
from rayos_vmm.config.reference import render

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_reference_is_current() -> None:
    """A key that was added, changed or taken away is so on the page."""
    assert (DOCS / "config.md").read_text() == render(), (
        "run .venv/bin/python -P -m rayos_vmm.config.reference > docs/config.md"
    )


def test_the_example_is_a_configuration() -> None:
    """The file in the documentation loads, and says what it seems to say."""
    config = load(DOCS / "example.toml")
    machine = config.vms["dev"]
    assert (config.service.resolver, machine.cpus, machine.zone) == ("host", 2, "lab")
    assert machine.watchdog.silence_s == 60

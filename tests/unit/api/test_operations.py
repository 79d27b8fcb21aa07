"""The names that tokens, audit records and clients hold on to: no operation is renamed, moved or opened by accident."""

from __future__ import annotations

from pathlib import Path

from rayos_vmm.api.app import ENDPOINTS
from rayos_vmm.api.guard import BEYOND_VM, CONSOLE_COMMAND, OWNER_ALONE, RIGHTS
from rayos_vmm.api.openapi import CONSOLE_PATH
from rayos_vmm.policy.capability import Capability, names

GOLDEN = Path(__file__).with_name("operations.txt")


def _lines() -> list[str]:
    operations = [(one.command, one.method, one.path) for one in ENDPOINTS]
    operations.append((CONSOLE_COMMAND, "GET", CONSOLE_PATH))
    found = []
    for command, method, path in operations:
        right = "|".join(names(RIGHTS.get(command, Capability.CAP_ADMIN))) or "-"
        flags = [
            word for word, names_ in (("beyond-vm", BEYOND_VM), ("owner", OWNER_ALONE)) if command in names_
        ]
        found.append(" ".join([command, right, method, path, *flags]))
    return sorted(found)


def test_commands_rights_and_paths_are_what_they_were() -> None:
    """One line an operation: command, right, method, path. Who changes one changes what others have written down."""
    assert _lines() == GOLDEN.read_text(encoding="utf-8").splitlines()

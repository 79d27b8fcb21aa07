"""The table of operations: its names stay what others have written down, and each row has its one handler."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayos_vmm.api import app
from rayos_vmm.api.endpoint import HANDLERS, serves
from rayos_vmm.contract import operations
from rayos_vmm.contract.operation import Operation
from rayos_vmm.contract.operations import COMMANDS, OPERATIONS
from rayos_vmm.policy.capability import names
from rayos_vmm.service.metrics import CONTENT_TYPE

GOLDEN = Path(__file__).with_name("operations.txt")


def _line(row: Operation[object]) -> str:
    flags = [
        word for word, is_set in (("beyond-vm", row.reaches_beyond_vm), ("owner", row.is_for_owner)) if is_set
    ]
    return " ".join([row.command, "|".join(names(row.right)) or "-", row.method, row.path, *flags])


def test_commands_rights_and_paths_are_what_they_were() -> None:
    """One line an operation: command, right, method, path. Who changes one changes what others have written down."""
    assert sorted(map(_line, OPERATIONS)) == GOLDEN.read_text(encoding="utf-8").splitlines()


def test_each_row_has_one_handler_and_each_handler_a_row() -> None:
    """The console's WebSocket alone is served by itself; a second handler for a row is refused."""
    assert app.NOUNS, "the modules that register are imported"
    assert set(HANDLERS) == {row.command for row in OPERATIONS} - {"console.attach"}
    assert len(COMMANDS) == len(OPERATIONS) == len({(row.method, row.path) for row in OPERATIONS})
    with pytest.raises(ValueError, match=r"machines\.list has a handler"):
        serves(operations.MACHINES_LIST)


def test_a_row_is_named_as_its_command() -> None:
    """Who reads `operations.GUEST_EXEC` knows what stands in the record."""
    assert all(getattr(operations, row.command.replace(".", "_").upper()) is row for row in OPERATIONS)
    assert operations.METRICS == CONTENT_TYPE


def test_a_path_takes_its_names_quoted() -> None:
    assert operations.FIREWALL_REMOVE.path_for("dev", "a/b") == "/v1/vms/dev/firewall/rules/a%2Fb"
    with pytest.raises(TypeError, match=r"firewall\.remove takes name, rule, not 1 values"):
        operations.FIREWALL_REMOVE.path_for("dev")

"""The table of operations: its names stay what others have written down, and each row has its one handler."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayos_vmm.api import app
from rayos_vmm.api.endpoint import HANDLERS, serves
from rayos_vmm.client.client import Client, to_error
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.contract import operations
from rayos_vmm.contract.operation import Operation
from rayos_vmm.contract.operations import COMMANDS, OPERATIONS
from rayos_vmm.errors import (
    Conflict,
    Forbidden,
    Invalid,
    Malformed,
    RateLimited,
    RayosError,
    TooLarge,
    Unavailable,
)
from rayos_vmm.policy.capability import names
from rayos_vmm.policy.gatekeeper import NotAllowed, Peer
from rayos_vmm.policy.token import Ask
from rayos_vmm.service.metrics import CONTENT_TYPE
from tests.unit.api.serving import answer_of, open_api, post, send_raw

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


async def test_405_says_which_methods_there_are(tmp_path: Path) -> None:
    """RFC 9110, 15.5.6."""
    async with open_api(tmp_path):
        raw = await send_raw(tmp_path / "api.sock", post("/v1/vms/dev/firewall", b"", "DELETE"))
    head, body = raw.split(b"\r\n\r\n", 1)
    assert b"405" in head.splitlines()[0] and b"allow: GET, PUT" in head.splitlines()
    assert b'"no_such_method"' in body


async def test_an_integer_may_be_written_with_a_point(tmp_path: Path) -> None:
    """JSON Schema's integers are numbers without a fraction, however they are written."""
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"))
        body = b'{"columns": 80.0, "rows": 25}'
        assert (
            answer_of(await send_raw(tmp_path / "api.sock", post("/v1/vms/dev/console/size", body)))[0] == 204
        )
        assert service.sizes == [("dev", 0, 80, 25)]
        with pytest.raises(Invalid, match=r"rows = 25\.5"):
            await client.request("POST", "/vms/dev/console/size", body={"columns": 80, "rows": 25.5})


@pytest.mark.parametrize(
    ("status", "class_"),
    [
        (403, Forbidden),
        (429, RateLimited),
        (503, Unavailable),
        (413, TooLarge),
        (400, Malformed),
        (409, Conflict),
    ],
)
def test_a_status_comes_back_as_its_class(status: int, class_: type[RayosError]) -> None:
    """Also with a code that the client has never heard of; the code stays."""
    error = to_error(status, b'{"error": {"code": "new", "message": "m", "hint": "h"}}')
    assert (type(error), error.code, error.message, error.hint) == (class_, "new", "m", "h")


async def test_every_request_of_the_client_carries_its_token(tmp_path: Path) -> None:
    """Answers without end and the console's socket, too: nobody knows this one."""
    async with open_api(tmp_path) as (_, service):
        shown: list[str] = []

        async def refuse(_ask: Ask, _peer: Peer, text: str, *, is_change: bool) -> None:
            shown.append(text)
            raise NotAllowed("nobody")

        service.gatekeeper.admit = refuse  # type: ignore[method-assign,assignment]
        client = Client(tmp_path / "api.sock", "a-token")
        asked = (
            client.events(),
            client.input_record("dev"),
            client.capture("dev"),
            client.console("dev", 0),
            client.console_pieces("dev", 0),
        )
        for one in asked:
            with pytest.raises(Forbidden, match="nobody"):
                async with one:
                    pass
        with pytest.raises(Forbidden):
            await client.machines()
        assert shown == ["a-token"] * (len(asked) + 1)

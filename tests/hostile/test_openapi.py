"""The document of the API is the truth: schemathesis asks a real daemon all that it allows, and much that it does not.

Its four phases run: examples, the edges of every range, random requests, and what follows from what (links). Answers
without end are ended after a moment on the way, so that their beginnings are judged too.
"""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from rayos_vmm.client.client import Client
from rayos_vmm.config.spec import Disk, VmSpec
from rayos_vmm.contract.operations import OPERATIONS
from rayos_vmm.errors import RayosError
from tests.framework.daemon import Daemon, open_daemon

#: An answer that has begun, and brings no more for so long, goes on for ever.
QUIET_S = 0.5
LAST_CHUNK = b"0\r\n\r\n"
CHECKS = """\
[phases]
fuzzing.generation.max-examples = 5
stateful.generation.max-examples = 40

[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 502, 503, 504]
"""
#: Of requests that have the right shape: see `Operation.is_judged`.
JUDGED = """
[[operations]]
include-operation-id = "{}"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 403, 404, 409, 422, 429, 502, 503, 504]
"""


async def _carry(path: Path, client: trio.SocketStream) -> None:
    """One connection of TCP to the daemon's socket and back."""
    async with client, await trio.open_unix_socket(path) as daemon, trio.open_nursery() as nursery:

        async def there() -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async for data in client:
                    await daemon.send_all(data)

        nursery.start_soon(there)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            is_open = False
            while True:
                data: bytes | bytearray | None = None
                with trio.move_on_after(QUIET_S if is_open else math.inf):
                    data = await daemon.receive_some(65536)
                if data is None:
                    await client.send_all(LAST_CHUNK)
                if not data:
                    break
                is_open = is_open or b"transfer-encoding: chunked" in data.lower()
                is_open = is_open and not data.endswith(LAST_CHUNK)
                await client.send_all(data)
        nursery.cancel_scope.cancel()


async def _judge(daemon: Daemon, directory: Path) -> tuple[int, str]:
    """schemathesis's status and what it said."""
    judged = [JUDGED.format(row.command.replace(".", "_")) for row in OPERATIONS if row.is_judged]
    (directory / "schemathesis.toml").write_text(CHECKS + "".join(judged))
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, partial(_carry, daemon.socket), 0, host="127.0.0.1")
        )
        port = listeners[0].socket.getsockname()[1]
        command = [
            *(
                str(Path(sys.executable).with_name("schemathesis")),
                "--config-file",
                "schemathesis.toml",
                "run",
            ),
            *(
                f"http://127.0.0.1:{port}/v1/openapi.json",
                "--no-color",
                "--seed",
                "1",
                "--generation-deterministic",
            ),
            *("--request-timeout", "30", "--continue-on-failure"),
        ]
        done = await trio.run_process(
            command, cwd=directory, capture_stdout=True, stderr=subprocess.STDOUT, check=False
        )
        nursery.cancel_scope.cancel()
    return done.returncode, done.stdout.decode()


async def _remove_all(client: Client) -> None:
    for _ in range(8):  # a parent goes after its children
        for view in await client.machines():
            with suppress(RayosError):
                await client.act(view.spec.name, "kill")
            with suppress(RayosError):
                await client.remove(view.spec.name)


async def test_the_api_does_what_its_document_says(tmp_path: Path) -> None:
    with open_daemon() as daemon:
        try:
            await daemon.client.create(VmSpec(name="dev", disks=[Disk(size="1MiB")]))
            status, said = await _judge(daemon, tmp_path)
        finally:
            await _remove_all(daemon.client)
        assert "Traceback" not in daemon.log(), daemon.log()
    assert status == 0, said

"""Requests that are cut, doubled, mixed and broken at random: no error of ours, nothing left open, the API goes on."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path

import trio
import trio.lowlevel
import trio.testing

from rayos_vmm.config.spec import VmSpec
from tests.unit.api.serving import open_api
from tests.unit.api.test_connection import UPGRADE, frame

#: RAYOS_FUZZ=100000 for longer.
CONNECTIONS = int(os.environ.get("RAYOS_FUZZ", "1000"))
AT_ONCE = 20
SEEDS = (
    b"GET /v1/vms HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/vms HTTP/1.0\r\n\r\n",
    b"HEAD /v1/info HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde",
    b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"PUT /v1/vms/dev/files?path=/a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nab",
    b'POST /v1/vms/dev/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{"command":"sleep"} ',
    b"GET /v1/events?since=0 HTTP/1.1\r\nHost: x\r\n\r\n",
    UPGRADE + frame(2, b"hi") + frame(9, b"p") + frame(8, b"\x03\xe8"),
    UPGRADE + frame(1, b"{}"),
)
PIECES = (
    b"\r\n",
    b"\0",
    b"Content-Length: 7\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Upgrade: h2c\r\n",
)


def mutated(chance: random.Random) -> bytes:
    """Up to three requests in a row, changed in up to four places."""
    data = bytearray(b"".join(chance.choice(SEEDS) for _ in range(chance.randint(1, 3))))
    for _ in range(chance.randint(0, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0 | 1:
                data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 4))
            case 2:
                data[at:at] = data[max(0, at - 20) : at] * chance.randint(1, 4)
            case 3:
                del data[at : at + chance.randint(1, 20)]
            case _:
                data[at:at] = chance.choice(PIECES)
    return bytes(data)


async def attack(path: Path, chance: random.Random) -> None:
    """One connection, sent in two parts, and left at some moment, in one of three ways."""
    data = mutated(chance)
    cut = chance.randrange(len(data) + 1)
    with suppress(trio.BrokenResourceError):
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(data[:cut])
            await trio.lowlevel.checkpoint()
            await stream.send_all(data[cut:])
            if chance.randrange(3) == 0:
                await stream.send_eof()
            with trio.move_on_after(chance.choice((0, 0, 0.02))):
                await stream.receive_some(65536)


async def test_no_bytes_make_an_error_of_ours(tmp_path: Path) -> None:
    chance = random.Random(11)
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"), start=True)
        for _ in range(CONNECTIONS // AT_ONCE):
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(attack, tmp_path / "api.sock", chance)
        counts = service.connections
        with trio.fail_after(60):
            while counts.open:
                await trio.testing.wait_all_tasks_blocked()
        assert (counts.failed, counts.accepted) == (0, CONNECTIONS + 1)
        assert [view.spec.name for view in await client.machines()] == ["dev"]

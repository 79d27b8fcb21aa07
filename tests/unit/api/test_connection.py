"""A connection is a boundary: what fails, drips, stalls or lies on one is that one's end, and no other's."""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
from starlette.types import ASGIApp, Receive, Scope, Send

from rayos_vmm.api.http.limits import PER_USER, STRANGERS, Deadlines, Lobby
from rayos_vmm.api.http.listening import Caller, Listening
from rayos_vmm.api.http.websocket import MESSAGE_MAXIMUM_BYTES
from rayos_vmm.api.server import GRACE_S, serve_api
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.service.connections import ConnectionCounts
from tests.unit.api.memory_service import MemoryService
from tests.unit.api.serving import answer_of, open_api, post, send_raw

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SHORT = Deadlines(idle_s=0.2, head_s=0.2, body_s=0.2, send_s=0.3)
LONG = Deadlines(math.inf, math.inf, math.inf, math.inf)
UPGRADE = (
    b"GET /v1/vms/dev/console?port=0 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """Says how long the body was; fails in every way that its path names."""
    if scope["path"] == "/fail":
        raise RuntimeError("a bug")
    if scope["path"] == "/silent":
        return
    size = 0
    while (message := await receive())["type"] == "http.request":
        size += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200})
    if scope["path"] == "/half":
        raise ExceptionGroup("several", [RuntimeError("one"), ValueError("two")])
    body = b"x" * (64 << 20) if scope["path"] == "/large" else str(size).encode()
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def served(
    directory: Path, app: ASGIApp = hello, deadlines: Deadlines = LONG
) -> AsyncIterator[tuple[Path, ConnectionCounts]]:
    """An application on a socket, for strangers."""
    counts, path = ConnectionCounts(), directory / "app.sock"
    listening = Listening(app, Lobby(()), counts, lambda _: Caller(7, {}), deadlines=deadlines)
    with trio.socket.socket(socket.AF_UNIX) as sock:
        await sock.bind(str(path))
        sock.listen(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listening.accept, sock, nursery)
            yield path, counts
            nursery.cancel_scope.cancel()


async def test_an_error_ends_its_connection_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the answer and in it; a hundred of them are two lines of the log, and another connection goes on."""
    async with served(tmp_path) as (path, counts), await trio.open_unix_socket(path) as other:
        for _ in range(50):
            status, body = answer_of(await send_raw(path, GET.replace(b" /", b" /fail")))
            assert (status, msgspec.json.decode(body)["error"]["code"]) == (500, "internal")
            assert (await send_raw(path, GET.replace(b" /", b" /half"))).startswith(b"HTTP/1.1 200")
        assert await send_raw(path, GET.replace(b" /", b" /silent")) != b""
        assert counts.failed == 100
        await other.send_all(GET)
        assert b" 200 " in await other.receive_some()
    assert len(caplog.records) == 1


async def test_requests_follow_each_other_and_bodies_come_in_every_form(tmp_path: Path) -> None:
    """Pipelined, chunked, announced with Expect, left unread by the application."""
    async with served(tmp_path) as (path, counts), await trio.open_unix_socket(path) as stream:
        chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked += b"3\r\nabc\r\n2;a=b\r\nde\r\n0\r\n\r\n"
        await stream.send_all(GET * 3 + chunked)
        answer = b""
        while answer.count(b"HTTP/1.1 200 OK\r\n") < 4 or not answer.endswith(b"0\r\n\r\n"):
            answer += await stream.receive_some()
        assert b"\r\n5\r\n0\r\n\r\n" in answer
        await stream.send_all(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        )
        assert b" 100 " in await stream.receive_some()
        await stream.send_all(b"ab")
        assert b" 200 " in await stream.receive_some()
        assert counts.accepted == 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 0),
        (b"GET / HT", 408),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{", 200),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{", 200),
    ],
)
async def test_who_drips_is_not_waited_for(sent: bytes, status: int, tmp_path: Path) -> None:
    """A byte at a time buys no time: neither before a request, nor in its head, nor in its body."""
    async with served(tmp_path, deadlines=SHORT) as (path, _), await trio.open_unix_socket(path) as stream:
        await stream.send_all(sent)
        began, answer = trio.current_time(), b""

        async def drip() -> None:
            with suppress(trio.BrokenResourceError):
                while sent:
                    await trio.sleep(0.02)
                    await stream.send_all(b"x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            while data := await stream.receive_some():
                answer += data
            nursery.cancel_scope.cancel()
        assert trio.current_time() - began < 30
        assert (answer_of(answer)[0] if answer else 0) == status


async def test_a_body_may_take_its_time_as_long_as_it_comes(tmp_path: Path) -> None:
    """Each 64 KiB buys a second."""
    async with served(tmp_path, deadlines=SHORT) as (path, _), await trio.open_unix_socket(path) as stream:
        await stream.send_all(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1114112\r\n\r\n" + b"x" * (1 << 20)
        )
        await trio.sleep(0.5)  # more than the body's first allowance
        await stream.send_all(b"x" * (1 << 16))
        answer = await stream.receive_some()
        assert b" 200 " in answer


async def test_who_does_not_read_is_not_waited_for(tmp_path: Path) -> None:
    async with (
        served(tmp_path, deadlines=SHORT) as (path, counts),
        await trio.open_unix_socket(path) as stream,
    ):
        await stream.send_all(GET.replace(b" /", b" /large"))
        answer = bytearray(await stream.receive_some())
        await trio.sleep(1.0)  # its time passes
        async for piece in stream:
            answer += piece
        assert len(answer) < 32 << 20 and counts.failed == 0


async def test_the_end_of_the_server_does_not_wait_for_who_does_not_read(tmp_path: Path) -> None:
    """The owner may stop his terminal; the daemon ends all the same, and idle connections at once."""
    service, path, shutdown = MemoryService(), tmp_path / "api.sock", trio.Event()
    service.files["dev", "/a"] = b"x" * (64 << 20)
    over = trio.Event()

    async def serve(task_status: trio.TaskStatus[None]) -> None:
        await serve_api(cast("Any", service), path, shutdown=shutdown.wait, task_status=task_status)
        over.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        async with await trio.open_unix_socket(path) as stream, await trio.open_unix_socket(path) as idle:
            await stream.send_all(b"GET /v1/vms/dev/files?path=/a HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await stream.receive_some(10) == b"HTTP/1.1 2"
            began = trio.current_time()
            shutdown.set()
            assert await idle.receive_some() == b""
            await over.wait()
            assert trio.current_time() - began < GRACE_S + 20


def test_the_shares_of_users() -> None:
    """16 each, 128 in all; what is given back is there again; the owner is counted apart."""
    lobby = Lobby((0, 1000))
    for uid in range(1, STRANGERS // PER_USER + 1):
        assert [lobby.enter(uid) for _ in range(PER_USER)] == [""] * PER_USER
        assert f"user {uid} has 16" in lobby.enter(uid)
    assert "128 connections of users other than the owner" in lobby.enter(99)
    assert lobby.enter(0) == lobby.enter(1000) == ""
    lobby.leave(3)
    assert lobby.enter(99) == "" and lobby.strangers == STRANGERS and lobby.own == 2


# -- WebSocket ------------------------------------------------------------------------------------------------------


def frame(
    op: int, data: bytes, *, is_masked: bool = True, is_last: bool = True, length: int | None = None
) -> bytes:
    """A client's frame (RFC 6455, 5.2), with any length in its head."""
    size = len(data) if length is None else length
    mask = 0x80 if is_masked else 0
    if size < 126:
        head = struct.pack(">BB", (0x80 if is_last else 0) | op, mask | size)
    elif size < 1 << 16:
        head = struct.pack(">BBH", (0x80 if is_last else 0) | op, mask | 126, size)
    else:
        head = struct.pack(">BBQ", (0x80 if is_last else 0) | op, mask | 127, size)
    return head + (bytes(4) if is_masked else b"") + data


PIECE = 60_000
HOSTILE = {
    "a length of 2^62": (frame(2, b"x" * (2 << 20), length=1 << 62), 1009),
    "2 MiB": (frame(2, b"x" * (2 << 20)), 1009),
    "endless fragments": (
        frame(2, b"x" * PIECE, is_last=False) + frame(0, b"x" * PIECE, is_last=False) * 100,
        1009,
    ),
    "unmasked": (frame(2, b"hi", is_masked=False), 1002),
    "a reserved operation": (frame(0xB, b""), 1002),
    "a reserved bit": (b"\xf2\x80\0\0\0\0", 1002),
    "a close of one byte": (frame(8, b"x"), 1002),
    "bad UTF-8": (frame(1, b"\xff\xfe"), 1007),
    "text that is no command": (frame(1, b"hello"), 1008),
    "100,000 pings": (frame(9, b"x" * 100) * 1000 + frame(8, struct.pack(">H", 1000)), 1000),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_hostile_websocket_is_closed_with_a_reason(case: str, tmp_path: Path) -> None:
    """The code is of RFC 6455, 7.4.1, and the API goes on."""
    data, code = HOSTILE[case]
    assert MESSAGE_MAXIMUM_BYTES < 2 << 20
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"), start=True)
        answer = bytearray()
        async with (
            await trio.open_unix_socket(tmp_path / "api.sock") as stream,
            trio.open_nursery() as nursery,
        ):

            async def send() -> None:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(UPGRADE + data)

            nursery.start_soon(send)
            with trio.fail_after(30), suppress(trio.BrokenResourceError):
                async for piece in stream:
                    answer += piece
        assert answer.startswith(b"HTTP/1.1 101")
        assert struct.pack(">H", code) in answer[-126:]
        assert [view.spec.name for view in await client.machines()] == ["dev"]
        assert service.connections.failed == 0


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (b"Version: 13", b"Version: 8", 426),
        (b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", b"", 400),
        (b"/vms/dev/console", b"/vms/none/console", 404),
        (b"/vms/dev/console", b"/vms/dev", 404),
        (b"port=0", b"port=77", 422),
    ],
)
async def test_a_websocket_that_cannot_be_is_refused_in_words(
    old: bytes, new: bytes, status: int, tmp_path: Path
) -> None:
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"), start=True)
        found, body = answer_of(await send_raw(tmp_path / "api.sock", UPGRADE.replace(old, new)))
        assert found == status and msgspec.json.decode(body)["error"]["message"]


async def test_an_unread_body_is_not_the_next_request(tmp_path: Path) -> None:
    """One that came whole is skipped; one that did not ends the connection after its answer."""
    async with open_api(tmp_path), await trio.open_unix_socket(tmp_path / "api.sock") as stream:
        hidden = b"GET /v1/info HTTP/1.1\r\nHost: x\r\n\r\n"
        raw = post("/v1/nothing", hidden).replace(b"Connection: close\r\n", b"")
        await stream.send_all(raw)
        assert b" 404 " in (first := await stream.receive_some()) and first.count(b"HTTP/1.1") == 1
        await stream.send_all(raw.replace(b"Content-Length: ", b"Content-Length: 9"))
        answer = b""
        async for piece in stream:
            answer += piece
        assert b" 404 " in answer and answer.count(b"HTTP/1.1") == 1

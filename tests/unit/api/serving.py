"""The real server, on a real socket, over the service in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import trio

from rayos_vmm.api.server import serve_api
from rayos_vmm.client.client import Client
from tests.unit.api.memory_service import MemoryService


@asynccontextmanager
async def open_api(directory: Path) -> AsyncIterator[tuple[Client, MemoryService]]:
    """A client and the service behind it; the server is shut down gracefully at the end."""
    service, path, shutdown = MemoryService(), directory / "api.sock", trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_api, cast("Any", service), path, shutdown=shutdown.wait))
        try:
            yield Client(path), service
        finally:
            shutdown.set()


async def send_raw(path: Path, request: bytes) -> bytes:
    """Everything the server answers to these bytes."""
    async with await trio.open_unix_socket(path) as stream:
        answer = bytearray()
        with suppress(trio.BrokenResourceError):  # it may answer and close before it has read all
            await stream.send_all(request)
        with trio.move_on_after(5.0), suppress(trio.BrokenResourceError):
            async for chunk in stream:
                answer += chunk
        return bytes(answer)


def post(path: str, body: bytes, method: str = "POST") -> bytes:
    """A request that closes its connection."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: rayos\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def answer_of(raw: bytes) -> tuple[int, bytes]:
    """(status, body) of a raw answer."""
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def spec(name: str = "dev", **more: Any) -> dict[str, Any]:
    return {"name": name, **more}

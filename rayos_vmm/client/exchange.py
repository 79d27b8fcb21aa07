"""One HTTP request over a unix socket and its answer, as it comes: h11 for the grammar, trio for the socket.

Invariant: one connection for one exchange. Leaving it, also by cancellation, closes the connection, which is
how the daemon learns that nobody waits any more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import h11
import trio

RECEIVE_BYTES: Final = 64 << 10


class Broken(Exception):
    """The connection ended before the answer did."""


class Unreachable(Exception):
    """Nothing answers on the socket."""


class Answer:
    """The answer's status, and its body piece by piece."""

    def __init__(self, stream: trio.SocketStream, connection: h11.Connection) -> None:
        self._stream = stream
        self._connection = connection
        self._is_closed = False
        self.status = 0

    async def _event(self) -> Any:
        try:
            while (event := self._connection.next_event()) is h11.NEED_DATA:
                try:
                    received = await self._stream.receive_some(RECEIVE_BYTES)
                except trio.BrokenResourceError:
                    received = b""
                self._is_closed = not received
                self._connection.receive_data(received)
        except h11.RemoteProtocolError as error:
            closed = "the connection was closed before the answer was complete"
            raise Broken(closed if self._is_closed else str(error)) from None
        return event

    async def start(self) -> None:
        """Waits for the status. Raises Broken when none comes."""
        while not isinstance(event := await self._event(), h11.Response):
            if isinstance(event, h11.ConnectionClosed):
                raise Broken("the connection was closed without an answer")
        self.status = event.status_code

    async def read(self) -> bytes:
        """The next piece of the body, empty at its end. Raises Broken when it is cut short."""
        while not isinstance(event := await self._event(), h11.Data):
            if isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return b""
        return bytes(event.data)

    async def read_all(self) -> bytes:
        """The whole body. Raises Broken when it is cut short."""
        body = bytearray()
        while piece := await self.read():
            body += piece
        return bytes(body)


@asynccontextmanager
async def open_exchange(
    socket_path: Path, method: str, target: str, body: bytes = b"", token: str = ""
) -> AsyncIterator[Answer]:
    """Sends a request and waits for the answer's status.

    Raises:
        Unreachable: nothing answers on the socket.
        Broken: it was closed before the answer came.
    """
    connection = h11.Connection(h11.CLIENT)
    headers = [("host", "rayos"), ("connection", "close"), ("content-length", str(len(body)))]
    if token:
        headers.append(("authorization", f"Bearer {token}"))
    request = connection.send(h11.Request(method=method, target=target, headers=headers)) or b""
    connection.send(h11.Data(data=body))
    connection.send(h11.EndOfMessage())
    try:
        stream = await trio.open_unix_socket(socket_path)
    except OSError as error:
        raise Unreachable(error.strerror) from None
    async with stream:
        # A daemon that refuses a body answers and closes before it has read all.
        with suppress(trio.BrokenResourceError):
            await stream.send_all(request + body)
        answer = Answer(stream, connection)
        await answer.start()
        yield answer

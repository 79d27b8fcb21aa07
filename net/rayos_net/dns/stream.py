"""DNS over TCP (RFC 7766): connections from one subnet, each question answered when its answer is there (trio).

A question is a length of two bytes and a message (RFC 1035, 4.2.2); several may be under way on a connection, and
answers need not keep their order (RFC 7766, 6.2.1.1).

Invariant: a client has at most CONNECTIONS_PER_CLIENT connections, all have CONNECTIONS_MAX: the one that was quiet
longest gives way. A connection that brings no whole question, or takes no answer, for IDLE_SECONDS is closed; one that
sends what is no question at once. A client is its address: what a guest can't forge is the spoof guard's to see to,
and a handshake reaches it only where the subnet is.
"""

import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Final

import trio

from rayos_net.dns.zone import HEADER_SIZE, QUERY_MAX

CONNECTIONS_MAX: Final = 64
CONNECTIONS_PER_CLIENT: Final = 4
IDLE_SECONDS: Final = 10.0  # RFC 7766, 6.2.3: some seconds
ANSWERS_MAX: Final = 32  # under way on a connection
MESSAGE_MAX: Final = 65535
_LENGTH: Final = struct.Struct("!H")
_BACKLOG: Final = 64

Reply = Callable[[bytes], None]
#: Given a question, its client and what takes the answer, once; False: it deserves none.
Handle = Callable[[bytes, str, Reply], bool]
#: The seconds that a client has to wait before its next question.
Admit = Callable[[str], float]


class _Connection:
    """One that is open; `since` is when it was quiet last."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.since = trio.current_time()
        self.scope = trio.CancelScope()
        self.unanswered = 0
        self.was_answered = trio.Event()

    def reply(self, send: trio.MemorySendChannel[bytes], answer: bytes) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # it is gone
            send.send_nowait(answer)

    async def wait_unanswered(self, at_most: int) -> None:
        """Returns when no more questions than that are under way."""
        while self.unanswered > at_most:
            self.was_answered = trio.Event()
            await self.was_answered.wait()


class Streams:
    """The listening socket at `server` and what is connected from `network`."""

    def __init__(
        self,
        server: IPv4Address,
        network: IPv4Network,
        port: int,
        admit: Admit,
        handle: Handle,
        count: Callable[[str], None],
    ) -> None:
        self._server = server
        self._network = network
        self._port = port
        self._admit = admit
        self._handle = handle
        self._count = count
        self._open: list[_Connection] = []
        self._socket: socket.socket

    def open(self, stack: ExitStack) -> None:
        """Listen. Errors: OSError."""
        self._socket = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((str(self._server), self._port))
        self._socket.listen(_BACKLOG)

    async def run(self) -> None:
        """Serve until cancelled."""
        await trio.serve_listeners(
            self._serve, [trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))]
        )

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            client = self._client(stream)
            if client is None:
                self._count("foreign_source")
            elif sum(one.client == client for one in self._open) >= CONNECTIONS_PER_CLIENT:
                self._count("streams_refused")
            else:
                if len(self._open) >= CONNECTIONS_MAX:
                    self._count("streams_displaced")
                    min(self._open, key=lambda one: one.since).scope.cancel()
                connection = _Connection(client)
                self._open.append(connection)
                try:
                    with connection.scope:
                        await self._talk(connection, stream)
                finally:
                    self._open.remove(connection)

    def _client(self, stream: trio.SocketStream) -> str | None:
        try:
            address = stream.socket.getpeername()[0]
        except OSError:
            return None  # it has gone already
        return address if IPv4Address(address) in self._network else None

    async def _talk(self, connection: _Connection, stream: trio.SocketStream) -> None:
        send, receive = trio.open_memory_channel[bytes](ANSWERS_MAX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, connection, stream, receive)
            await self._read(connection, stream, send)
            # The client has said all; what it asked is answered yet.
            with trio.move_on_after(IDLE_SECONDS):
                await connection.wait_unanswered(0)
            nursery.cancel_scope.cancel()

    async def _read(
        self, connection: _Connection, stream: trio.SocketStream, send: trio.MemorySendChannel[bytes]
    ) -> None:
        buffer = bytearray()
        while True:
            question = None
            with trio.move_on_after(IDLE_SECONDS):
                question = await read_message(stream, buffer, QUERY_MAX)
            if question is None:
                return
            await self._turn(connection.client)
            await connection.wait_unanswered(ANSWERS_MAX - 1)  # so there is room for its answer
            connection.since = trio.current_time()
            connection.unanswered += 1
            if not self._handle(question, connection.client, partial(connection.reply, send)):
                connection.unanswered -= 1
                return
            await trio.lowlevel.checkpoint()

    async def _turn(self, client: str) -> None:
        while True:
            wait = self._admit(client)
            if not wait:
                return
            await trio.sleep(wait)

    async def _write(
        self, connection: _Connection, stream: trio.SocketStream, answers: trio.MemoryReceiveChannel[bytes]
    ) -> None:
        try:
            async for answer in answers:
                with trio.fail_after(IDLE_SECONDS):
                    await stream.send_all(frame_of(answer))
                connection.since = trio.current_time()
                connection.unanswered -= 1
                connection.was_answered.set()
        except (trio.BrokenResourceError, trio.TooSlowError):
            connection.scope.cancel()


def frame_of(message: bytes) -> bytes:
    """A message as it goes over TCP, in one piece (RFC 7766, 8)."""
    return _LENGTH.pack(len(message)) + message


async def read_message(
    stream: trio.SocketStream, buffer: bytearray, size_max: int = MESSAGE_MAX
) -> bytes | None:
    """The next message; what came behind it stays in `buffer`. None: the other side has ended, or sends what is none.

    After cancellation what has come is in `buffer`.
    """
    while True:
        if len(buffer) >= _LENGTH.size:
            stop = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
            if not HEADER_SIZE <= stop - _LENGTH.size <= size_max:
                return None
            if len(buffer) >= stop:
                message = bytes(buffer[_LENGTH.size : stop])
                del buffer[:stop]
                return message
        try:
            more = await stream.receive_some(QUERY_MAX)
        except trio.BrokenResourceError:
            return None
        if not more:
            return None
        buffer += more

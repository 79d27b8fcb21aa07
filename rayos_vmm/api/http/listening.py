"""Takes connections in and serves each behind a boundary of its own.

Invariant: whatever happens on a connection ends that connection alone; it is counted, and logged within a bound. When
the process is out of descriptors, strangers are turned away, and the owner is served by one of those that are kept for
him.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import trio
from starlette.types import ASGIApp

from rayos_vmm.api.http.connection import HttpConnection, Idle
from rayos_vmm.api.http.exchange import PeerGone, Wire, error_body
from rayos_vmm.api.http.limits import OWNER_DEADLINES, STRANGER_DEADLINES, Deadlines, Lobby, Sparing
from rayos_vmm.service.connections import ConnectionCounts

log = logging.getLogger(__name__)
#: Descriptors that are kept for the owner's connections.
SPARE: Final = 4
#: Without any descriptor left: so long until it is tried again, unless a connection ends before.
_AGAIN_S: Final = 1.0
_NO_DESCRIPTOR: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end: a user (uid), and what the application finds of him in its scope."""

    uid: int
    scope: dict[str, Any]


class Listening:
    """Serves an application on listening sockets; `caller_of` says who connected."""

    def __init__(
        self,
        app: ASGIApp,
        lobby: Lobby,
        counts: ConnectionCounts,
        caller_of: Callable[[trio.socket.SocketType], Caller],
        *,
        owner_deadlines: Deadlines = OWNER_DEADLINES,
        deadlines: Deadlines = STRANGER_DEADLINES,
    ) -> None:
        self.idle = Idle()
        self._app = app
        self._lobby = lobby
        self._counts = counts
        self._caller_of = caller_of
        self._owner_deadlines = owner_deadlines
        self._deadlines = deadlines
        self._spares: list[int] = []
        self._left = trio.Event()  # a connection has ended
        self._failures = Sparing(log, "A connection ended with an error of ours")
        self._shortage = Sparing(log, "A connection cannot be accepted")

    async def accept(self, listener: trio.socket.SocketType, connections: trio.Nursery) -> None:
        """Takes in who comes, as tasks of `connections`. Ends when cancelled."""
        self._keep_spares()
        try:
            while True:
                sock = await self._next(listener)
                if sock is not None:
                    self._welcome(sock, connections)
        finally:
            while self._spares:
                os.close(self._spares.pop())

    async def _next(self, listener: trio.socket.SocketType) -> trio.socket.SocketType | None:
        try:
            return (await listener.accept())[0]
        except OSError as error:
            if error.errno == errno.ECONNABORTED:
                return None  # it left before it was let in
            self._shortage.error(error.strerror or str(error))
            is_rescued = error.errno in _NO_DESCRIPTOR and bool(self._spares)
        if not is_rescued:
            left = self._left
            with trio.move_on_after(_AGAIN_S):
                await left.wait()
            self._keep_spares()
            return None
        os.close(self._spares.pop())
        with suppress(OSError):
            return (await listener.accept())[0]
        return None

    def _keep_spares(self) -> None:
        with suppress(OSError):
            while len(self._spares) < SPARE:
                self._spares.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))

    def _welcome(self, sock: trio.socket.SocketType, connections: trio.Nursery) -> None:
        try:
            caller = self._caller_of(sock)
        except OSError:
            sock.close()
            return
        self._keep_spares()
        is_own = caller.uid in self._lobby.owners
        reason, why = "limit", self._lobby.enter(caller.uid)
        if not why and not is_own and len(self._spares) < SPARE:
            self._lobby.leave(caller.uid)
            reason, why = "descriptors", "the service has no descriptor left for another connection"
        if why:
            self._counts.refused[reason] += 1
            with suppress(OSError):
                os.write(sock.fileno(), _turned_away(why))
            sock.close()
            return
        self._counts.accepted += 1
        self._counts.open += 1
        connections.start_soon(self._serve, trio.SocketStream(sock), caller)

    async def _serve(self, stream: trio.SocketStream, caller: Caller) -> None:
        deadlines = self._owner_deadlines if caller.uid in self._lobby.owners else self._deadlines
        try:
            async with stream:
                await HttpConnection(Wire(stream, deadlines), self._app, caller.scope, self.idle).run()
        except* PeerGone:
            pass  # it has its reasons
        except* Exception as group:  # the supervisor boundary of a connection
            self._counts.failed += 1
            self._failures.error(f"user {caller.uid}", group)
        finally:
            self._lobby.leave(caller.uid)
            self._counts.open -= 1
            self._keep_spares()
            left, self._left = self._left, trio.Event()
            left.set()


def _turned_away(why: str) -> bytes:
    body = error_body("too_many_connections", why)
    head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

"""Before anything else: may this caller do that? Every route passes here, also those that are added later.

The route alone says what a request asks for: its row has the command and the right that it needs, its path the machine.
A path that is in no row needs CAP_ADMIN.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Any, Final, Protocol

import trio
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from rayos_vmm.api.endpoint import as_rayos_error, error_response
from rayos_vmm.config.spec import is_name
from rayos_vmm.contract.operation import Operation
from rayos_vmm.errors import NotFound
from rayos_vmm.policy.capability import Capability
from rayos_vmm.policy.gatekeeper import NotAllowed, Peer
from rayos_vmm.policy.token import Ask

#: Where the server leaves the peer's credentials.
PEER: Final = "rayos.peer"
_UCRED: Final = struct.Struct("iII")  # struct ucred, unix(7): pid, uid, gid
_READING: Final = frozenset(("GET", "HEAD"))
_SHOWN_MAXIMUM: Final = 40


class Admission(Protocol):
    """Decides (`policy.gatekeeper`)."""

    async def admit(self, ask: Ask, peer: Peer, text: str, *, is_change: bool) -> None: ...


def peer_of(sock: trio.socket.SocketType) -> Peer:
    """Who connected to a unix socket: the kernel noted it then, so it cannot change since."""
    return Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


class Guard:
    """The application, for those who may ask; `routes` has the row of each."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[tuple[BaseRoute, Operation[Any]]], admission: Admission
    ) -> None:
        self._app = app
        self._routes = routes
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            await self._check(scope)
        except Exception as error:  # the supervisor boundary of a request
            response = error_response(as_rayos_error(error))
            if scope["type"] == "websocket":
                await WebSocket(scope, receive, send).send_denial_response(response)
            else:
                await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _check(self, scope: Scope) -> None:
        peer = scope.get(PEER)
        if not isinstance(peer, Peer):
            raise NotAllowed("nobody knows who asks: it did not come over the service's socket")
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme and scheme.lower() != "bearer":
            raise NotAllowed(f"authorization {scheme[:20]!r}; it has to be Bearer and a token")
        is_change = scope["type"] == "websocket" or scope["method"] not in _READING
        ask, name = self._ask(scope)
        await self._admission.admit(ask, peer, token.strip(), is_change=is_change)
        if name and not is_name(name):
            raise NotFound(
                f"nothing has the name {shown(name)}: a name has 1 to 32 of a-z, 0-9 and -, and no - at the ends"
            )

    def _ask(self, scope: Scope) -> tuple[Ask, str]:
        """Returns the request in words, and the name in its path. A name that is none is not told as a machine's."""
        for route, row in self._routes:
            match, child = route.matches(scope)
            if match is Match.FULL:
                name = child["path_params"].get("name", "")
                vm = name if scope["path"].startswith("/v1/vms/") and is_name(name) else ""
                ask = Ask(
                    row.command,
                    row.right,
                    vm,
                    is_within_vm=bool(vm) and not row.reaches_beyond_vm,
                    is_for_owner=row.is_for_owner,
                    is_frequent=row.is_frequent,
                )
                return ask, name
        return Ask("unknown", Capability.CAP_ADMIN), ""


def shown(text: str) -> str:
    """A text of a caller's, cut to what a message may hold."""
    return (
        repr(text) if len(text) <= _SHOWN_MAXIMUM else f"{text[:_SHOWN_MAXIMUM]!r}… ({len(text)} characters)"
    )

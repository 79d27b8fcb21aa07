"""Before anything else: may this caller do that? Every route passes here, also those that are added later.

What a request asks for is told by its route alone: the command, the right that it needs (`RIGHTS`; CAP_ADMIN for all
that is not named there), and the machine of its path.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import trio
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from rayos_vmm.api.endpoint import as_rayos_error, error_response
from rayos_vmm.config.spec import is_name
from rayos_vmm.errors import NotFound
from rayos_vmm.policy.capability import NONE, Capability
from rayos_vmm.policy.gatekeeper import NotAllowed, Peer
from rayos_vmm.policy.token import Ask

#: Where the server leaves the peer's credentials.
PEER: Final = "rayos.peer"
CONSOLE_COMMAND: Final = "console.attach"
_UCRED: Final = struct.Struct("iII")  # struct ucred, unix(7): pid, uid, gid

_C = Capability
#: What a token needs where it is less than CAP_ADMIN; NONE: any valid token.
RIGHTS: Final[Mapping[str, Capability]] = {
    **dict.fromkeys(
        ("machines.info", "machines.list", "machines.get", "machines.wait", "machines.stats"), NONE
    ),
    **dict.fromkeys(
        (
            f"input.{what}"
            for what in ("devices", "events", "key", "mouse", "pointer", "replay", "touch", "type")
        ),
        _C.CAP_INPUT,
    ),
    "guest.size": _C.CAP_CONSOLE_W,
    "console.log": _C.CAP_CONSOLE_R,
    "console.write": _C.CAP_CONSOLE_W,
    CONSOLE_COMMAND: _C.CAP_CONSOLE_R | _C.CAP_CONSOLE_W,
    **dict.fromkeys(("display.screenshot", "display.info", "display.damage"), _C.CAP_GPU),
    **dict.fromkeys(("firewall.rules", "firewall.explain"), _C.CAP_NET),
    **dict.fromkeys((f"device.{what}" for what in ("overview", "list", "show", "limits", "metrics")), NONE),
    **dict.fromkeys(("dhcp.status", "dhcp.leases", "net.view"), _C.CAP_NET),
    **dict.fromkeys(("firewall.rules", "firewall.explain", "firewall.trace"), _C.CAP_NET),
    "events.events": _C.CAP_AUDIT,
    "device.prometheus": _C.CAP_AUDIT,
    **dict.fromkeys(
        (f"policy.{verb}" for verb in ("grants", "explain", "security", "audit", "verify", "key", "export")),
        _C.CAP_AUDIT,
    ),
    **dict.fromkeys((f"hierarchy.{verb}" for verb in ("show", "diff", "history", "zones")), _C.CAP_AUDIT),
    **dict.fromkeys(("scalability.status", "scalability.load"), _C.CAP_AUDIT),
    **dict.fromkeys((f"tpm.{verb}" for verb in ("status", "pcrs", "log", "explain", "quote")), _C.CAP_AUDIT),
}
#: These have a machine in their path, and reach beyond it.
BEYOND_VM: Final = frozenset(("policy.delegate", "hierarchy.assign"))
OWNER_ALONE: Final = frozenset(("token.create", "token.revoke", "token.list"))
_SHOWN_MAXIMUM: Final = 40
_READING: Final = frozenset(("GET", "HEAD"))


class Admission(Protocol):
    """Decides (`policy.gatekeeper`)."""

    async def admit(self, ask: Ask, peer: Peer, text: str, *, is_change: bool) -> None: ...


def peer_of(sock: trio.socket.SocketType) -> Peer:
    """Who connected to a unix socket: the kernel noted it then, so it cannot change since."""
    return Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


class Guard:
    """The application, for those who may ask; `commands` names the routes."""

    def __init__(self, app: ASGIApp, routes: Sequence[tuple[BaseRoute, str]], admission: Admission) -> None:
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
        for route, command in self._routes:
            match, child = route.matches(scope)
            if match is Match.FULL:
                name = child["path_params"].get("name", "")
                vm = name if scope["path"].startswith("/v1/vms/") and is_name(name) else ""
                ask = Ask(
                    command,
                    RIGHTS.get(command, Capability.CAP_ADMIN),
                    vm,
                    is_within_vm=bool(vm) and command not in BEYOND_VM,
                    is_for_owner=command in OWNER_ALONE,
                    is_frequent=command.startswith("input.") or command == "console.write",
                )
                return ask, name
        return Ask("unknown", Capability.CAP_ADMIN), ""


def shown(text: str) -> str:
    """A text of a caller's, cut to what a message may hold."""
    return (
        repr(text) if len(text) <= _SHOWN_MAXIMUM else f"{text[:_SHOWN_MAXIMUM]!r}… ({len(text)} characters)"
    )

"""The ASGI application: every endpoint, its document, the console's socket, one shape of error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from rayos_vmm.api import (
    console,
    device,
    dhcp,
    disk,
    display,
    events,
    faults,
    firewall,
    grant,
    guest,
    input,
    machines,
    net,
    policy,
    scalability,
    token,
    tpm,
)
from rayos_vmm.api.endpoint import error_response, to_asgi
from rayos_vmm.api.guard import Guard
from rayos_vmm.api.openapi import build
from rayos_vmm.contract.operation import JSON, Operation
from rayos_vmm.contract.operations import CONSOLE_ATTACH, OPERATIONS
from rayos_vmm.errors import NotFound, RayosError

if TYPE_CHECKING:
    from rayos_vmm.service.service import Service

#: The modules that register the handlers, by importing them; every row but the console's WebSocket has one.
NOUNS: Final = (
    *(console, device, dhcp, disk, display, events, faults, firewall, grant, guest, input, machines),
    *(net, policy, scalability, token, tpm),
)
OPENAPI_PATH: Final = "/v1/openapi.json"


Named = Sequence[tuple[BaseRoute, Operation[Any]]]


def _http_error(named: Named) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Paths and methods that are not there, in our words; 405 says which methods are (RFC 9110, 15.5.6)."""

    async def handle(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        problem = RayosError(
            f"{request.method} {request.url.path[:200]}: "
            + {405: "this path has no such method"}.get(status, str(error)),
            hint=f"GET {OPENAPI_PATH} describes the API",
            code={405: "no_such_method"}.get(status, "failed"),
        )
        problem.status = status
        response = error_response(problem)
        if status == 405:
            here = {row.method for route, row in named if route.matches(request.scope)[0] is not Match.NONE}
            response.headers["allow"] = ", ".join(sorted(here or {"GET"}))
        return response

    return handle


async def _no_such_path(scope: Scope, receive: Receive, send: Send) -> None:
    problem = NotFound(
        f"{scope['path'][:200]}: there is no such path",
        hint=f"GET {OPENAPI_PATH} describes the API",
        code="no_such_path",
    )
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(error_response(problem))
    elif scope["type"] == "http":
        await error_response(problem)(scope, receive, send)


def _document() -> Callable[[Request], Awaitable[Response]]:
    encoded = b""

    async def handle(_request: Request) -> Response:
        nonlocal encoded
        encoded = encoded or msgspec.json.encode(build(OPERATIONS, version=version("rayos-vmm")))
        return Response(encoded, media_type=JSON)

    return handle


class _Counted:
    """Tells the service that somebody is there, for as long as a request or stream lasts."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        with self._service.client():
            await self._app(scope, receive, send)


def create_app(service: Service) -> ASGIApp:
    """The application over a running service."""
    named: list[tuple[BaseRoute, Operation[Any]]] = [
        (Route(row.path, to_asgi(row, service), methods=[row.method], name=row.command), row)
        for row in OPERATIONS
        if row is not CONSOLE_ATTACH
    ]
    named.append(
        (WebSocketRoute(CONSOLE_ATTACH.path, partial(console.serve_console, service=service)), CONSOLE_ATTACH)
    )
    app = Starlette(
        routes=[*(route for route, _ in named), Route(OPENAPI_PATH, _document(), methods=["GET"])],
        exception_handlers={HTTPException: _http_error(named)},
    )
    app.router.redirect_slashes = False  # a redirect would name the host that the client made up
    app.router.default = _no_such_path
    return Guard(_Counted(app, service), named, service.gatekeeper)

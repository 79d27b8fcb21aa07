"""The ASGI application: every endpoint, its document, the console's socket, one shape of error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
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
from rayos_vmm.api.endpoint import JSON, Endpoint, error_response, to_asgi
from rayos_vmm.api.guard import CONSOLE_COMMAND, Guard
from rayos_vmm.api.openapi import CONSOLE_PATH, build
from rayos_vmm.errors import NotFound, RayosError

if TYPE_CHECKING:
    from rayos_vmm.service.service import Service

ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    *machines.ENDPOINTS,
    *guest.ENDPOINTS,
    *display.ENDPOINTS,
    *input.ENDPOINTS,
    *console.ENDPOINTS,
    *events.ENDPOINTS,
    *grant.ENDPOINTS,
    *policy.ENDPOINTS,
    *scalability.ENDPOINTS,
    *token.ENDPOINTS,
    *tpm.ENDPOINTS,
    *dhcp.ENDPOINTS,
    *disk.ENDPOINTS,
    *firewall.ENDPOINTS,
    *faults.ENDPOINTS,
    *net.ENDPOINTS,
    *device.ENDPOINTS,
)
OPENAPI_PATH: Final = "/v1/openapi.json"


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    problem = RayosError(
        f"{request.method} {request.url.path[:200]}: "
        + {405: "this path has no such method"}.get(status, str(error)),
        hint=f"GET {OPENAPI_PATH} describes the API",
        code={405: "no_such_method"}.get(status, "failed"),
    )
    problem.status = status
    return error_response(problem)


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
        encoded = encoded or msgspec.json.encode(build(ENDPOINTS, version=version("rayos-vmm")))
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
    routes = [
        Route(
            endpoint.path,
            to_asgi(endpoint, service),
            methods=[endpoint.method],
            name=endpoint.handler.__name__,
        )
        for endpoint in ENDPOINTS
    ]
    attach = WebSocketRoute(CONSOLE_PATH, partial(console.serve_console, service=service))
    app = Starlette(
        routes=[*routes, Route(OPENAPI_PATH, _document(), methods=["GET"]), attach],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a redirect would name the host that the client made up
    app.router.default = _no_such_path
    commands = [endpoint.command for endpoint in ENDPOINTS]
    named: list[tuple[BaseRoute, str]] = [*zip(routes, commands, strict=True), (attach, CONSOLE_COMMAND)]
    return Guard(_Counted(app, service), named, service.gatekeeper)

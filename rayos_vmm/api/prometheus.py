"""`GET /metrics` alone on a TCP port of this host, for a Prometheus that cannot reach the API's socket.

Read-only, without tokens: whoever is on this host may read what is counted. So only loopback addresses are listened on.
"""

from __future__ import annotations

import ipaddress
import re
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rayos_vmm.api.http.limits import Lobby
from rayos_vmm.api.http.listening import Caller, Listening
from rayos_vmm.errors import Busy, Invalid
from rayos_vmm.service.metrics import CONTENT_TYPE, render

if TYPE_CHECKING:
    from rayos_vmm.service.service import Service


_ANYBODY: Final = -1  # TCP does not say which user connects: all of them share what one may have


def parse_address(text: str) -> tuple[str, int]:
    """Address and port of `127.0.0.1:9100` or `[::1]:9100`; port 0 is any.

    Raises:
        Invalid: it is not that, or not an address of this host alone.
    """
    match = re.fullmatch(r"\[?([0-9a-f.:]+?)\]?:([0-9]{1,5})", text)
    try:
        address = ipaddress.ip_address(match[1]) if match else None
    except ValueError:
        address = None
    if match is None or address is None or not address.is_loopback or int(match[2]) > 65535:
        raise Invalid(f"{text!r} is not a loopback address and a port, such as 127.0.0.1:9100")
    return str(address), int(match[2])


async def serve_prometheus(
    service: Service,
    address: str,
    port: int,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled; started with the port.

    Raises:
        Busy: the port is taken.
    """

    async def metrics(_request: Request) -> Response:
        return Response(await render(service), media_type=CONTENT_TYPE)

    app = Starlette(routes=[Route("/metrics", metrics)])
    app.router.redirect_slashes = False
    listening = Listening(app, Lobby(()), service.connections, lambda _sock: Caller(_ANYBODY, {}))
    try:
        listeners = await trio.open_tcp_listeners(port, host=address)
    except OSError as error:
        raise Busy(f"{address}:{port} cannot be listened on: {error.strerror or error}") from None
    task_status.started(listeners[0].socket.getsockname()[1])
    async with AsyncExitStack() as stack:
        for listener in listeners:
            await stack.enter_async_context(listener)
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(listening.accept, listener.socket, nursery)

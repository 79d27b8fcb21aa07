"""`GET /metrics` alone on a TCP port of this host, for a Prometheus that cannot reach the API's socket.

Read-only, without tokens: whoever is on this host may read what is counted. So only loopback addresses are listened on.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rayos_vmm.errors import Busy, Invalid
from rayos_vmm.service.metrics import CONTENT_TYPE, render

if TYPE_CHECKING:
    from rayos_vmm.service.service import Service


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

    config = Config()
    config.include_server_header = False
    config.loglevel = "ERROR"
    app = wrap_app(
        cast("Any", Starlette(routes=[Route("/metrics", metrics)])), config.wsgi_max_body_size, "asgi"
    )
    context = WorkerContext(None)

    async def connection(stream: trio.SocketStream) -> None:
        await TCPServer(app, config, context, ConnectionState({}), cast("Any", stream))

    try:
        listeners = await trio.open_tcp_listeners(port, host=address)
    except OSError as error:
        raise Busy(f"{address}:{port} cannot be listened on: {error.strerror or error}") from None
    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(connection, listeners)

"""A console of a guest over a WebSocket, and what it has said so far.

Binary frames are the console's bytes, both ways. Text frames are JSON: from us `{"offset": N}`, the position
of the next byte, first of all and after every gap; from the client `{"columns": C, "rows": R}`, its size.
The socket closes with 1000 when the guest's console ends, with 1008 after a frame that is neither.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

import msgspec
import trio
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from rayos_vmm.api.body import decode
from rayos_vmm.api.endpoint import BYTES, Call, Endpoint, as_rayos_error, decode_query, error_response
from rayos_vmm.api.types import ConsoleSize, PortQuery, StreamQuery

if TYPE_CHECKING:
    from rayos_vmm.service import Service

NORMAL: Final = 1000  # RFC 6455, 7.4.1
POLICY_VIOLATION: Final = 1008
LOG_QUIET_S: Final = 0.1  # a replay comes without pauses: after one of this length we are at the present
LOG_MAXIMUM_BYTES: Final = 16 << 20


class _Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    columns: int
    rows: int


async def _send(socket: WebSocket, chunks: AsyncIterator[tuple[int, bytes]]) -> None:
    position = -1
    async for offset, data in chunks:
        if offset != position:
            await socket.send_text(f'{{"offset": {offset}}}')
        await socket.send_bytes(data)
        position = offset + len(data)


async def _receive(socket: WebSocket, service: Service, name: str, port: int) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        data: bytes | None = message.get("bytes")
        if data is not None:
            await service.console_write(name, port, data)
            continue
        size = decode(message["text"].encode(), _Size)
        checked = msgspec.convert(
            {"port": port, "columns": size.columns, "rows": size.rows}, ConsoleSize, strict=True
        )
        await service.console_resize(name, port, checked.columns, checked.rows)


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    if socket.application_state is WebSocketState.CONNECTED:
        try:
            await socket.close(code, reason.encode()[:120].decode(errors="ignore"))
        except (RuntimeError, WebSocketDisconnect, OSError):
            return  # it left first


async def serve_console(socket: WebSocket, service: Service) -> None:
    """One client of one console, until either side ends it."""
    name = socket.path_params["name"]
    try:
        query = decode_query(socket, StreamQuery)
        async with service.console_stream(name, query.port, query.since) as chunks:
            await socket.accept()
            async with trio.open_nursery() as nursery:

                async def from_client() -> None:
                    await _receive(socket, service, name, query.port)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(from_client)
                await _send(socket, chunks)
                nursery.cancel_scope.cancel()
        await _close(socket, NORMAL, "the console ended")
    except Exception as error:  # the supervisor boundary of a connection
        if _left(error):
            return
        problem = as_rayos_error(error)
        if socket.application_state is WebSocketState.CONNECTING:
            await socket.send_denial_response(error_response(problem))
        else:
            await _close(socket, POLICY_VIOLATION, problem.message)


def _left(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_left(inner) for inner in error.exceptions)
    return isinstance(error, WebSocketDisconnect | OSError)


async def _log(call: Call) -> bytes:
    """What is kept of a console's past: replay from 0, until nothing more is at hand."""
    kept = bytearray()
    async with call.service.console_stream(call.name, call.query.port, 0) as chunks:
        with trio.move_on_after(LOG_QUIET_S) as quiet:
            async for _, data in chunks:
                kept += data
                quiet.deadline = trio.current_time() + LOG_QUIET_S
                if len(kept) > LOG_MAXIMUM_BYTES:
                    break
    return bytes(kept)


ENDPOINTS: Final = (
    Endpoint(
        "GET", "/v1/vms/{name}/console/log", _log, "What a console said so far", query=PortQuery, media=BYTES
    ),
)

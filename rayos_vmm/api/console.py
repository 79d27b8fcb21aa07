"""A console of a guest over a WebSocket, and what it has said so far.

Binary frames are the console's bytes, both ways. Text frames are JSON: from us `{"is_writer": B, "writer": WHO}`,
first of all and whenever that changes, and `{"offset": N}`, the position of the next byte, before the first and after
every gap; from the client `{"columns": C, "rows": R}`, its size, and `{"take": true}`, to become the writer.
The socket closes with 1000 when the guest's console ends, with 1008 after a frame that is none of these. What a watcher
types is dropped, and so is its size; both were told.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import msgspec
import trio
from starlette.responses import Response
from starlette.types import Scope
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from rayos_vmm.api.body import decode, read_limited
from rayos_vmm.api.endpoint import Call, as_rayos_error, decode_query, error_response, serves
from rayos_vmm.api.guard import PEER
from rayos_vmm.api.stream import Stream
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import ConsolePorts
from rayos_vmm.contract.asks import ConsoleSize, StreamQuery
from rayos_vmm.contract.operation import NDJSON
from rayos_vmm.errors import Conflict
from rayos_vmm.machine.seats import Seat
from rayos_vmm.policy.gatekeeper import Peer
from rayos_vmm.shared.timed import Span

if TYPE_CHECKING:
    from rayos_vmm.service.service import Service

NORMAL: Final = 1000  # RFC 6455, 7.4.1
POLICY_VIOLATION: Final = 1008
LOG_QUIET_S: Final = 0.1  # a replay comes without pauses: after one of this length we are at the present
LOG_MAXIMUM_BYTES: Final = 16 << 20
INPUT_MAXIMUM_BYTES: Final = 1 << 20


class _Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    columns: int = 0
    rows: int = 0
    take: bool = False


async def _send(socket: WebSocket, chunks: AsyncIterator[tuple[int, bytes]]) -> bool:
    """All that the console says; False when the client left before its end."""
    position = -1
    async for offset, data in chunks:
        try:
            if offset != position:
                await socket.send_text(f'{{"offset": {offset}}}')
            await socket.send_bytes(data)
        except (WebSocketDisconnect, OSError):
            return False
        position = offset + len(data)
    return True


async def _tell(socket: WebSocket, seat: Seat) -> None:
    """Who writes, whenever that changes."""
    told = (seat.is_writer, seat.writer)
    while True:
        await seat.changed()
        now = (seat.is_writer, seat.writer)
        if now != told:
            told = now
            try:
                await socket.send_text(_writer(seat))
            except (WebSocketDisconnect, OSError):
                return


def _writer(seat: Seat) -> str:
    return msgspec.json.encode({"is_writer": seat.is_writer, "writer": seat.writer}).decode()


async def _receive(socket: WebSocket, service: Service, name: str, port: int, seat: Seat) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        data: bytes | None = message.get("bytes")
        if data is not None:
            if seat.is_writer:
                await service.guests.console_write(name, port, data)
            continue
        said = decode(message["text"].encode(), _Said)
        if said.take:
            seat.take()
            continue
        checked = msgspec.convert(
            {"port": port, "columns": said.columns, "rows": said.rows}, ConsoleSize, strict=True
        )
        if seat.is_writer:
            await service.guests.console_resize(name, port, checked.columns, checked.rows)


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    if socket.application_state is WebSocketState.CONNECTED:
        try:
            await socket.close(code, reason.encode()[:120].decode(errors="ignore"))
        except (RuntimeError, WebSocketDisconnect, OSError):
            return  # it left first


async def _attend(
    socket: WebSocket,
    service: Service,
    name: str,
    port: int,
    seat: Seat,
    chunks: AsyncIterator[tuple[int, bytes]],
) -> None:
    async with trio.open_nursery() as nursery:

        async def from_client() -> None:
            await _receive(socket, service, name, port, seat)
            nursery.cancel_scope.cancel()

        nursery.start_soon(from_client)
        nursery.start_soon(_tell, socket, seat)
        if await _send(socket, chunks):
            nursery.cancel_scope.cancel()
        # Else the client has left: what it typed before is still written, up to its disconnection.


def _who(scope: Scope) -> str:
    """The client, as the others are told of it."""
    peer = scope.get(PEER)
    return f"process {peer.pid} of user {peer.uid}" if isinstance(peer, Peer) else "somebody"


async def serve_console(socket: WebSocket, service: Service) -> None:
    """One client of one console, until either side ends it."""
    name = socket.path_params["name"]
    try:
        query = decode_query(socket, StreamQuery)
        with service.guests.console_seat(name, query.port, _who(socket.scope), query.mode) as seat:
            async with service.guests.console_stream(name, query.port, query.since) as chunks:
                await socket.accept()
                await socket.send_text(_writer(seat))
                await _attend(socket, service, name, query.port, seat, chunks)
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


@serves(operations.CONSOLE_LOG)
async def _log(call: Call) -> bytes:
    """Replays the kept past of a console from 0, until nothing more is at hand."""
    kept = bytearray()
    async with call.service.guests.console_stream(call.name, call.query.port, 0) as chunks:
        with trio.move_on_after(LOG_QUIET_S) as quiet:
            async for _, data in chunks:
                kept += data
                quiet.deadline = trio.current_time() + LOG_QUIET_S
                if len(kept) > LOG_MAXIMUM_BYTES:
                    break
    return bytes(kept)


@serves(operations.CONSOLE_PORTS)
async def _ports(call: Call) -> ConsolePorts:
    return ConsolePorts(ports=await call.service.guests.console_ports(call.name))


@serves(operations.CONSOLE_TIMED)
async def _timed(call: Call) -> Response:
    query = call.query

    async def lines(since: int, *, follow: bool) -> AsyncGenerator[bytes, None]:
        async with call.service.guests.console_pieces(call.name, query.port, since, follow=follow) as pieces:
            async for piece in pieces:
                yield msgspec.json.encode(piece) + b"\n"

    kept = b"".join([line async for line in lines(query.since, follow=False)])
    if not query.follow:
        return Response(kept, media_type=NDJSON)
    last = msgspec.json.decode(kept[kept[:-1].rfind(b"\n") + 1 :], type=Span) if kept else None
    behind = query.since if last is None else last.offset + len(last.data)

    async def live() -> AsyncGenerator[bytes, None]:
        yield kept
        async with aclosing(lines(behind, follow=True)) as rest:
            async for line in rest:
                yield line

    return Stream(live(), media_type=NDJSON)


@serves(operations.CONSOLE_WRITE)
async def _write(call: Call) -> None:
    """Input, taken by the device when this answers; a client that leaves meanwhile cannot know."""
    data = await read_limited(call.request, INPUT_MAXIMUM_BYTES)
    with call.service.guests.console_seat(
        call.name, call.query.port, _who(call.request.scope), "write"
    ) as seat:
        if not seat.is_writer:
            raise Conflict(
                f"{seat.writer} writes on console {call.query.port} of {call.name}",
                hint="`rayos console --take` takes over",
            )
        await call.service.guests.console_write(call.name, call.query.port, data)

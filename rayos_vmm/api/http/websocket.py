"""One WebSocket (RFC 6455) after its HTTP request: wsproto for the frames, an ASGI application for the rest.

Invariant: a message is at most `MESSAGE_MAXIMUM_BYTES`, however many frames it comes in; no extension is spoken, so
what comes is what was sent.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Final

import h11
import trio
from starlette.types import ASGIApp, Message, Scope
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError, generate_accept_token

from rayos_vmm.api.http.exchange import Exchange, Wire, error_body, scope_of

MESSAGE_MAXIMUM_BYTES: Final = 1 << 20
_VERSION: Final = b"13"  # RFC 6455, 4.1
_REASON_MAXIMUM_BYTES: Final = 123  # RFC 6455, 5.5: a control frame has at most 125 bytes


class WebSocketExchange:
    """A request to speak WebSocket, and what is said if the application accepts it."""

    def __init__(self, http: h11.Connection, wire: Wire, request: h11.Request) -> None:
        self._http = http
        self._wire = wire
        self._request = request
        self._key = b""
        self._frames: Connection | None = None  # once it is accepted
        self._came: deque[Event] = deque()
        self._pieces: list[bytes] | list[str] = []
        self._size = 0
        self._is_asked = False
        self._is_over = False
        self._answer = Exchange(http, wire, request)
        self._reading = trio.Lock()
        self._sending = trio.Lock()

    async def run(self, app: ASGIApp, more: Scope) -> None:
        """Until either side closes it. Raises what the application raises, and PeerGone."""
        fields = dict(self._request.headers)
        key, version = websocket_key(self._request), fields.get(b"sec-websocket-version", b"")
        self._http.next_event()  # the end of a request without a body
        if not key or version != _VERSION:
            why = f"a WebSocket needs a key and version 13, not {version[:20].decode('latin-1')!r}"
            await self._deny(426 if key else 400, why, [(b"sec-websocket-version", _VERSION)])
            return
        self._key = key
        scope = scope_of(self._request, {**more, "type": "websocket", "scheme": "ws", "subprotocols": []})
        scope["extensions"] = {"websocket.http.response": {}}
        del scope["method"]
        await app(scope, self.receive, self.send)
        if self._frames is None:
            if self._http.our_state is h11.SEND_RESPONSE:
                await self._deny(500, "the service did not answer")
        elif self._frames.state is ConnectionState.OPEN:
            await self._say(CloseConnection(code=CloseReason.INTERNAL_ERROR))
        await self._wire.linger()

    # -- what comes ----------------------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """The next message, or that the client left; see the ASGI specification."""
        async with self._reading:
            if not self._is_asked:
                self._is_asked = True
                return {"type": "websocket.connect"}
            while not self._is_over and self._frames is not None:
                while self._came:
                    message = await self._take(self._came.popleft(), self._frames)
                    if message is not None:
                        return message
                await self._read(self._frames)
            return {"type": "websocket.disconnect", "code": CloseReason.ABNORMAL_CLOSURE}

    async def _read(self, frames: Connection) -> None:
        data = await self._wire.receive(math.inf)
        try:
            frames.receive_data(data or None)
        except LocalProtocolError:  # it was closed, by both sides
            self._is_over = True
            return
        self._came.extend(frames.events())

    async def _take(self, event: Event, frames: Connection) -> Message | None:
        if isinstance(event, Ping):
            await self._say(event.response())
        elif isinstance(event, CloseConnection):
            self._is_over = True
            if frames.state is ConnectionState.REMOTE_CLOSING:
                await self._say(event.response())
            elif frames.state is ConnectionState.OPEN:  # not RFC 6455, what came
                await self._say(_closing(event.code, event.reason or ""))
            return {"type": "websocket.disconnect", "code": event.code, "reason": event.reason}
        elif isinstance(event, TextMessage | BytesMessage):
            return await self._assemble(event)
        return None

    async def _assemble(self, event: TextMessage | BytesMessage) -> Message | None:
        self._size += len(event.data)
        if self._size > MESSAGE_MAXIMUM_BYTES:
            self._is_over = True
            why = f"a message exceeds {MESSAGE_MAXIMUM_BYTES} bytes"
            await self._say(_closing(CloseReason.MESSAGE_TOO_BIG, why))
            return {"type": "websocket.disconnect", "code": CloseReason.MESSAGE_TOO_BIG}
        self._pieces.append(event.data)  # type: ignore[arg-type]  # of one kind: wsproto sees to that
        if not event.message_finished:
            return None
        pieces, self._pieces, self._size = self._pieces, [], 0
        if isinstance(event, TextMessage):
            return {"type": "websocket.receive", "text": "".join(pieces)}  # type: ignore[arg-type]
        return {"type": "websocket.receive", "bytes": b"".join(pieces)}  # type: ignore[arg-type]

    # -- what is answered ----------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """A message, the acceptance, the end, or a refusal; see the ASGI specification. Raises PeerGone."""
        match message["type"]:
            case "websocket.accept":
                await self._accept(message.get("headers", []))
            case "websocket.http.response.start":
                await self._answer.start(message["status"], [*message["headers"], (b"connection", b"close")])
            case "websocket.http.response.body":
                await self._answer.body(message.get("body", b""), is_last=not message.get("more_body", False))
            case "websocket.send":
                text, data = message.get("text"), message.get("bytes")
                await self._say(
                    TextMessage(data=text) if text is not None else BytesMessage(data=data or b"")
                )
            case "websocket.close" if self._frames is None:
                await self._deny(403, "there is no WebSocket here")
            case "websocket.close":
                await self._say(_closing(message.get("code", 1000), message.get("reason") or ""))

    async def _accept(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        answer = h11.InformationalResponse(
            status_code=101,
            headers=[
                (b"upgrade", b"websocket"),
                (b"connection", b"Upgrade"),
                (b"sec-websocket-accept", generate_accept_token(self._key)),
                *headers,
            ],
        )
        await self._wire.send(self._http.send(answer) or b"")
        self._frames = Connection(ConnectionType.SERVER, trailing_data=self._http.trailing_data[0])
        self._came.extend(self._frames.events())

    async def _deny(self, status: int, why: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        body = error_body("no_websocket", why)
        kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._answer.start(status, [*kind, *headers, (b"connection", b"close")])
        await self._answer.body(body, is_last=True)

    async def _say(self, event: Event) -> None:
        async with self._sending:
            if self._frames is None:
                return
            try:
                data = self._frames.send(event)
            except LocalProtocolError:
                return  # it is closed: nobody hears
            await self._wire.send(data)


def _closing(code: int, reason: str) -> CloseConnection:
    return CloseConnection(code=code, reason=reason.encode()[:_REASON_MAXIMUM_BYTES].decode(errors="ignore"))


def websocket_key(request: h11.Request) -> bytes | None:
    """The key of a request to speak WebSocket (RFC 6455, 4.2.1), empty when it has none; None of any other request."""
    fields = dict(request.headers)
    tokens = [token.strip().lower() for token in fields.get(b"connection", b"").split(b",")]
    if (
        request.method != b"GET"
        or fields.get(b"upgrade", b"").lower() != b"websocket"
        or b"upgrade" not in tokens
    ):
        return None
    return fields.get(b"sec-websocket-key", b"")

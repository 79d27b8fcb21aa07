"""One HTTP/1.1 connection: requests one after the other, each handed to an ASGI application.

HTTP/2 is not spoken: its preface is answered with 505, and `Upgrade: h2c` is ignored (RFC 9110, 7.8).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import h11
import trio
from starlette.types import ASGIApp, Scope

from rayos_vmm.api.http.exchange import Exchange, PeerGone, TooSlow, Wire, answer_head, error_body, scope_of
from rayos_vmm.api.http.limits import HEAD_MAXIMUM_BYTES
from rayos_vmm.api.http.websocket import WebSocketExchange, websocket_key

_CODES: Final = {408: "timeout", 414: "too_large", 431: "too_large", 500: "internal"}


class Idle:
    """The connections on which no request is under way; `end` closes these, and the others after their request."""

    def __init__(self) -> None:
        self._scopes: set[trio.CancelScope] = set()
        self.is_over = False

    def end(self) -> None:
        """Nobody is served any more that is not served now."""
        self.is_over = True
        for scope in self._scopes:
            scope.cancel()

    async def wait(self, wire: Wire, seconds: float) -> bytes:
        """The first bytes of a request; empty when none comes."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            if self.is_over:
                scope.cancel()
            try:
                return await wire.receive(seconds)
            except TooSlow:
                return b""
            finally:
                self._scopes.discard(scope)
        return b""


class HttpConnection:
    """Requests, one after the other, until either side ends it."""

    def __init__(self, wire: Wire, app: ASGIApp, more: Scope, idle: Idle) -> None:
        self._wire = wire
        self._app = app
        self._more = more
        self._idle = idle
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAXIMUM_BYTES)

    async def run(self) -> None:
        """Raises PeerGone when the client left before it was answered, and whatever the application raises."""
        while (request := await self._request()) is not None:
            if websocket_key(request) is not None:
                await WebSocketExchange(self._http, self._wire, request).run(self._app, self._more)
                return
            exchange = Exchange(self._http, self._wire, request)
            try:
                await self._app(scope_of(request, self._more), exchange.receive, exchange.send)
            except Exception:
                await self._refuse(500, "the service failed; the daemon's log says how")
                raise
            if not exchange.is_whole or self._idle.is_over:
                await self._refuse(500, "the service did not answer")
                break
            self._http.start_next_cycle()
        await self._wire.linger()

    async def _request(self) -> h11.Request | None:
        """The next request with its head; None when there is none, or it was refused."""
        try:
            event = self._http.next_event()
            if event is h11.NEED_DATA and not self._http.trailing_data[0]:
                self._http.receive_data(await self._idle.wait(self._wire, self._wire.deadlines.idle_s))
                event = self._http.next_event()
            began = trio.current_time()
            while event is h11.NEED_DATA:
                left = began + self._wire.deadlines.head_s - trio.current_time()
                self._http.receive_data(await self._wire.receive(max(0.0, left)))
                event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint, f"this is no request: {error}")
            return None
        except TooSlow:
            await self._refuse(408, f"the request did not come within {self._wire.deadlines.head_s:g} s")
            return None
        if not isinstance(event, h11.Request):
            return None
        status, problem = _problem(event)
        if problem:
            await self._refuse(status, problem)
            return None
        return event

    async def _refuse(self, status: int, why: str) -> None:
        """Answers in the application's place, if nobody has begun to."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = error_body(_CODES.get(status, "malformed"), why)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        head = self._http.send(answer_head(status, headers, is_last=True)) or b""
        with suppress(PeerGone):
            await self._wire.send(head + (self._http.send(h11.Data(data=body)) or b""))
            self._http.send(h11.EndOfMessage())


def _problem(request: h11.Request) -> tuple[int, str]:
    """Status and sentence of what is wrong with a request's head; 0 and "" when nothing is."""
    if request.http_version not in (b"1.0", b"1.1"):
        version = request.http_version.decode("ascii")
        return 505, f"HTTP/{version} is not spoken here; HTTP/1.1 is"
    size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
    if size > HEAD_MAXIMUM_BYTES:
        status = 414 if len(request.target) > HEAD_MAXIMUM_BYTES // 2 else 431
        return status, f"a head of {size} bytes exceeds the {HEAD_MAXIMUM_BYTES} that are allowed"
    return 0, ""

"""One request and its answer on a socket: h11 for the grammar (RFC 9112), trio for the socket.

Invariant: what nobody asks for is not read, so a body waits in the socket until its endpoint takes it, piece by piece;
and nothing of a stranger's is waited for without a deadline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import Final
from urllib.parse import unquote

import h11
import msgspec
import trio
from starlette.types import Message, Scope

from rayos_vmm.api.http.limits import BODY_RATE, Deadlines
from rayos_vmm.contract.answers import Error, ErrorBody

RECEIVE_BYTES: Final = 64 << 10
SEND_BYTES: Final = 64 << 10
#: What a client may send ahead while its request is served.
AHEAD_MAXIMUM_BYTES: Final = 64 << 10
#: So much of a refused body, and for so long, is read and thrown away, so that the client comes to read the answer.
_LINGER_BYTES: Final = 1 << 20
_LINGER_S: Final = 1.0
_STATUSES: Final = frozenset(HTTPStatus)
_BODILESS: Final = frozenset((204, 304))


class PeerGone(OSError):
    """The client left, or does not take what is sent."""


class TooSlow(Exception):
    """The client did not send in time."""


class Wire:
    """The socket: pieces of bounded size, and deadlines."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, deadlines: Deadlines) -> None:
        self._stream = stream
        self.deadlines = deadlines

    async def receive(self, seconds: float) -> bytes:
        """Returns the next bytes, none at the end. Raises TooSlow after `seconds`."""
        with trio.move_on_after(seconds):
            try:
                return bytes(await self._stream.receive_some(RECEIVE_BYTES))
            except trio.BrokenResourceError:
                return b""
        raise TooSlow

    async def send(self, data: bytes) -> None:
        """Raises PeerGone when it is not taken."""
        for start in range(0, len(data), SEND_BYTES):
            with trio.move_on_after(self.deadlines.send_s) as scope:
                try:
                    await self._stream.send_all(data[start : start + SEND_BYTES])
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise PeerGone(str(error)) from None
            if scope.cancelled_caught:
                raise PeerGone(f"nothing was taken for {self.deadlines.send_s:g} s")

    async def linger(self) -> None:
        """Says that no more will come, and gives the client time to read what came."""
        with trio.move_on_after(_LINGER_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_eof()
            thrown_away = 0
            while thrown_away < _LINGER_BYTES and (data := await self._stream.receive_some(RECEIVE_BYTES)):
                thrown_away += len(data)


def error_body(code: str, message: str) -> bytes:
    """The body of an answer that no endpoint gives."""
    return msgspec.json.encode(Error(error=ErrorBody(code=code, message=message, hint="")))


def scope_of(request: h11.Request, more: Scope) -> Scope:
    """A request as ASGI has it; `more` is added."""
    path, _, query = request.target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": request.http_version.decode("ascii"),
        "method": request.method.decode("ascii"),
        "scheme": "http",
        "path": unquote(path.decode("ascii")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": list(request.headers),
        "client": None,
        "server": None,
        **more,
    }


def answer_head(status: int, headers: Iterable[tuple[bytes, bytes]], *, is_last: bool) -> h11.Response:
    """An answer's head, with the date and the status in words."""
    last = [(b"connection", b"close")] if is_last else []
    date = (b"date", formatdate(usegmt=True).encode("ascii"))
    phrase = HTTPStatus(status).phrase if status in _STATUSES else ""
    return h11.Response(status_code=status, headers=[*headers, date, *last], reason=phrase.encode("ascii"))


class Exchange:
    """One request and its answer."""

    def __init__(self, http: h11.Connection, wire: Wire, request: h11.Request) -> None:
        self._http = http
        self._wire = wire
        self._is_head = request.method == b"HEAD"
        self._has_body = True
        self._reading = trio.Lock()
        self._is_cut = False  # nothing more comes
        self._received = 0
        self._waited = 0.0

    # -- what comes ----------------------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """The next piece of the body, or that the client left; see the ASGI specification."""
        async with self._reading:
            if not self._is_cut and self._http.their_state is h11.SEND_BODY:
                return await self._piece_of_body()
            if not self._is_cut and self._http.our_state is not h11.DONE:
                await self._until_gone()
            return {"type": "http.disconnect"}

    async def _piece_of_body(self) -> Message:
        try:
            if self._http.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await self._wire.send(self._http.send(go_on) or b"")
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._more())
        except (h11.RemoteProtocolError, TooSlow, PeerGone):
            self._is_cut = True
            return {"type": "http.disconnect"}
        if isinstance(event, h11.Data):
            self._received += len(event.data)
            return {"type": "http.request", "body": bytes(event.data), "more_body": True}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _more(self) -> bytes:
        allowed = self._wire.deadlines.body_s + self._received / BODY_RATE
        began = trio.current_time()
        try:
            return await self._wire.receive(max(0.0, allowed - self._waited))
        finally:
            self._waited += trio.current_time() - began

    async def _until_gone(self) -> None:
        """Waits for the client's end. One that sends far ahead meanwhile has left, too."""
        while len(self._http.trailing_data[0]) <= AHEAD_MAXIMUM_BYTES:
            data = await self._wire.receive(math.inf)
            self._http.receive_data(data)
            if not data:
                break
        self._is_cut = True

    # -- what is answered ----------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """A part of the answer; see the ASGI specification. Raises PeerGone."""
        if message["type"] == "http.response.start":
            await self.start(message["status"], message.get("headers", []))
        elif message["type"] == "http.response.body":
            await self.body(message.get("body", b""), is_last=not message.get("more_body", False))

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """The head of the answer. What is left of the body by now nobody will read: the connection ends then."""
        self._skip_what_came()
        self._has_body = not self._is_head and status not in _BODILESS
        head = answer_head(status, headers, is_last=self._is_cut or self._http.their_state is h11.SEND_BODY)
        await self._wire.send(self._http.send(head) or b"")

    async def body(self, data: bytes, *, is_last: bool) -> None:
        """A piece of the answer's body."""
        if self._has_body and data:
            await self._wire.send(self._http.send(h11.Data(data=data)) or b"")
        if is_last:
            await self._wire.send(self._http.send(h11.EndOfMessage()) or b"")

    def _skip_what_came(self) -> None:
        if self._http.their_state is not h11.SEND_BODY or self._http.they_are_waiting_for_100_continue:
            return
        try:
            while isinstance(self._http.next_event(), h11.Data):
                pass
        except h11.RemoteProtocolError:
            self._is_cut = True

    @property
    def is_whole(self) -> bool:
        """Both sides said all that they had to say, and another request may come."""
        return not self._is_cut and self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

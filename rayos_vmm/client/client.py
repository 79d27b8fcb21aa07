"""The client of the API: what every front end (command line, tests, pytest fixture) uses.

Invariant: an answer that is not a success is raised as the same `RayosError` class that the service raised.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote, urlencode

import msgspec
import trio

from rayos_vmm import errors
from rayos_vmm.client.exchange import Answer, Broken, Unreachable, open_exchange
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.contract.types import Error
from rayos_vmm.events import Event
from rayos_vmm.machine.recording import Step
from rayos_vmm.machine.seats import Wish
from rayos_vmm.machine.view import Damage, DiskView, ExecResult, VmView
from rayos_vmm.shared.timed import Span

CONNECT_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 0.5
# The service keeps the time limits of what it does; beyond them the client allows for the way.
MARGIN_S: Final = 15.0
DEFAULT_TIMEOUT_S: Final = 180.0

_CLASSES: Final = {
    class_.code: class_
    for class_ in (
        errors.NotFound,
        errors.Conflict,
        errors.Invalid,
        errors.GuestGone,
        errors.Timeout_,
        errors.Busy,
    )
}
_BY_STATUS: Final = {
    404: errors.NotFound,
    409: errors.Conflict,
    400: errors.Invalid,
    413: errors.Invalid,
    422: errors.Invalid,
    502: errors.GuestGone,
    504: errors.Timeout_,
}


_T = TypeVar("_T")


def _target(path: str, query: Mapping[str, str | int | float] | None) -> str:
    return f"/v1{path}?{urlencode(query)}" if query else f"/v1{path}"


def _vm(name: str) -> str:
    return f"/vms/{quote(name, safe='')}"


class NoDaemon(errors.RayosError):
    """Nothing answers on the socket."""

    code = "no_daemon"
    status = 503


def to_error(status: int, body: bytes) -> errors.RayosError:
    """The error that an answer carries."""
    try:
        said = msgspec.json.decode(body, type=Error).error
    except msgspec.DecodeError:
        return errors.RayosError(f"the daemon answered {status} without a reason")
    class_ = _CLASSES.get(said.code) or _BY_STATUS.get(status, errors.RayosError)
    return class_(said.message, hint=said.hint, code=said.code)


class Client:
    """One daemon, over its socket; a connection for each call. Methods raise what the service raises, and NoDaemon."""

    def __init__(self, socket_path: Path, token: str = "") -> None:
        self._socket_path = socket_path
        self._token = token

    @contextmanager
    def _explained(self, method: str, path: str) -> Iterator[None]:
        try:
            yield
        except Unreachable as error:
            raise NoDaemon(
                f"no daemon answers on {self._socket_path} ({error})",
                hint="start one with `rayos serve`; `rayos run` starts one by itself",
            ) from None
        except Broken as error:
            raise NoDaemon(
                f"the daemon went away during {method} {path}: {error}",
                hint="guests go on without it; `rayos serve` starts another that adopts them",
            ) from None

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        content: bytes = b"",
        query: Mapping[str, str | int | float] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> bytes:
        """The answer's body. `body` travels as JSON, `content` as it is."""
        content = msgspec.json.encode(body) if body is not None else content
        try:
            with self._explained(method, path), trio.fail_after(timeout_s):
                async with open_exchange(
                    self._socket_path, method, _target(path, query), content, self._token
                ) as answer:
                    received = await answer.read_all()
        except trio.TooSlowError:
            raise errors.Timeout_(
                f"the daemon did not answer {method} {path} within {timeout_s:g} s"
            ) from None
        if not 200 <= answer.status < 300:
            raise to_error(answer.status, received)
        return received

    async def _view(self, method: str, path: str, **options: Any) -> VmView:
        return msgspec.json.decode(await self.request(method, path, **options), type=VmView)

    async def info(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(await self.request("GET", "/info"))
        return found

    async def create(self, spec: VmSpec, *, start: bool = False) -> VmView:
        return await self._view("POST", "/vms", body={"spec": spec, "start": start})

    async def machines(self) -> list[VmView]:
        body = await self.request("GET", "/vms")
        return msgspec.json.decode(body, type=dict[str, list[VmView]])["vms"]

    async def get(self, name: str) -> VmView:
        return await self._view("GET", f"{_vm(name)}")

    async def act(self, name: str, verb: str) -> VmView:
        """`verb` is start, kill, pause, resume or reset."""
        return await self._view("POST", f"{_vm(name)}/{verb}")

    async def stop(self, name: str, *, timeout_s: float = 20.0) -> VmView:
        body = {"timeout_s": timeout_s}
        return await self._view("POST", f"{_vm(name)}/stop", body=body, timeout_s=timeout_s + MARGIN_S)

    async def remove(self, name: str) -> None:
        await self.request("DELETE", f"{_vm(name)}")

    async def wait(self, name: str, condition: str, *, timeout_s: float = 60.0) -> VmView:
        query = {"for": condition, "timeout_s": timeout_s}
        return await self._view("GET", f"{_vm(name)}/wait", query=query, timeout_s=timeout_s + MARGIN_S)

    async def exec(self, name: str, command: str | list[str], *, timeout_s: float = 60.0) -> ExecResult:
        body = {"command": command, "timeout_s": timeout_s}
        answer = await self.request("POST", f"{_vm(name)}/exec", body=body, timeout_s=timeout_s + MARGIN_S)
        return msgspec.json.decode(answer, type=ExecResult)

    async def read_file(self, name: str, path: str) -> bytes:
        return await self.request("GET", f"{_vm(name)}/files", query={"path": path})

    async def write_file(self, name: str, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await self.request("PUT", f"{_vm(name)}/files", query={"path": path, "mode": mode}, content=data)

    async def disks(self, name: str) -> list[DiskView]:
        return msgspec.json.decode(await self.request("GET", f"{_vm(name)}/disks"), type=list[DiskView])

    async def resize_disk(self, name: str, size: str, *, disk: int = 0) -> DiskView:
        body = {"size": size, "disk": disk}
        answer = await self.request("PUT", f"{_vm(name)}/disks/size", body=body)
        return msgspec.json.decode(answer, type=DiskView)

    async def screenshot(self, name: str, *, scanout: int = 0, with_cursor: bool = False) -> bytes:
        query = {"scanout": scanout, "cursor": "true" if with_cursor else "false"}
        return await self.request("GET", f"{_vm(name)}/screenshot", query=query)

    async def display(self, name: str) -> dict[str, Any]:
        """`serial` of the newest change, and `scanouts`."""
        found: dict[str, Any] = msgspec.json.decode(await self.request("GET", f"{_vm(name)}/display"))
        return found

    async def resize(self, name: str, width: int, height: int, scanout: int = 0) -> None:
        body = {"width": width, "height": height, "scanout": scanout}
        await self.request("POST", f"{_vm(name)}/display/resize", body=body)

    async def wait_damage(
        self, name: str, since: int, scanout: int = 0, *, timeout_s: float = 60.0
    ) -> Damage:
        """Waits for damage on a scanout after serial `since` and returns it; Timeout_ when there is none."""
        query = {"since": since, "scanout": scanout, "timeout_s": timeout_s}
        body = await self.request(
            "GET", f"{_vm(name)}/display/damage", query=query, timeout_s=timeout_s + MARGIN_S
        )
        return msgspec.json.decode(body, type=Damage)

    async def type_text(self, name: str, text: str, *, layout: str | None = None) -> None:
        await self.request("POST", f"{_vm(name)}/type", body={"text": text, "layout": layout})

    async def send_key(self, name: str, combo: str) -> None:
        await self.request("POST", f"{_vm(name)}/key", body={"combo": combo})

    async def pointer(self, name: str, x: float, y: float, buttons: tuple[str, ...] = ()) -> None:
        await self.request("POST", f"{_vm(name)}/pointer", body={"x": x, "y": y, "buttons": buttons})

    async def qmp_transcript(self, name: str) -> str:
        """Returns the QMP transcript of its last run, one JSON object a line."""
        return (await self.request("GET", f"{_vm(name)}/qmp")).decode(errors="replace")

    async def mouse(
        self, name: str, dx: int, dy: int, *, wheel: int = 0, buttons: Sequence[str] = ()
    ) -> None:
        body = {"dx": dx, "dy": dy, "wheel": wheel, "buttons": buttons}
        await self.request("POST", f"{_vm(name)}/mouse", body=body)

    async def touch(self, name: str, points: Sequence[tuple[float, float]]) -> None:
        await self.request("POST", f"{_vm(name)}/touch", body={"points": points})

    async def input_devices(self, name: str) -> list[dict[str, Any]]:
        """Each input device: lights, what is held down, what waits, what was dropped."""
        found: list[dict[str, Any]] = msgspec.json.decode(await self.request("GET", f"{_vm(name)}/input"))[
            "devices"
        ]
        return found

    async def input_events(self, name: str, device: str, events: Sequence[tuple[int, int, int]]) -> None:
        """Hands evdev events (type, code, value) to a device."""
        await self.request("POST", f"{_vm(name)}/input", body={"device": device, "events": events})

    async def input_replay(self, name: str, steps: Sequence[Step], *, speed: float = 1.0) -> None:
        """Does a recording again; returns when it is done."""
        needed_s = steps[-1].t / speed if steps and speed > 0 else 0.0
        body = {"steps": steps, "speed": speed}
        await self.request(
            "POST", f"{_vm(name)}/input/replay", body=body, timeout_s=needed_s + DEFAULT_TIMEOUT_S
        )

    @asynccontextmanager
    async def input_record(self, name: str) -> AsyncIterator[AsyncIterator[Step]]:
        """Records the events that reach the input devices, from the block's beginning until the machine ends."""
        path = f"{_vm(name)}/input/record"
        with self._explained("GET", path):
            async with open_exchange(self._socket_path, "GET", _target(path, None)) as answer:
                if answer.status != 200:
                    raise to_error(answer.status, await answer.read_all())
                lines = _JsonLines(answer, Step)
                await lines.skip()
                yield lines

    async def qmp(self, name: str, command: str, arguments: dict[str, Any] | None = None) -> Any:
        body = {"command": command, "arguments": arguments}
        return msgspec.json.decode(await self.request("POST", f"{_vm(name)}/qmp", body=body))["return"]

    async def stats(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(await self.request("GET", f"{_vm(name)}/stats"))
        return found

    async def leases(self) -> Any:
        return msgspec.json.decode(await self.request("GET", "/dhcp/leases"))["leases"]

    async def console_log(self, name: str, port: int) -> bytes:
        return await self.request("GET", f"{_vm(name)}/console/log", query={"port": port})

    async def console_write(self, name: str, port: int, data: bytes) -> None:
        """Type into a console; returns once the device has taken it.

        Raises:
            Conflict: somebody else writes there.
        """
        await self.request("PUT", f"{_vm(name)}/console/input", query={"port": port}, content=data)

    async def console_ports(self, name: str) -> list[dict[str, Any]]:
        """The ports: number, name, guest_open, columns, rows, writer, watchers."""
        body = await self.request("GET", f"{_vm(name)}/console/ports")
        ports: list[dict[str, Any]] = msgspec.json.decode(body)["ports"]
        return ports

    @asynccontextmanager
    async def console_pieces(
        self, name: str, port: int, *, since: int = 0, follow: bool = False
    ) -> AsyncIterator[AsyncIterator[Span]]:
        """Yields the kept output of a console with its times; up to now, or on and on."""
        query = {"port": port, "since": since, "follow": "true" if follow else "false"}
        async with self._lines(f"{_vm(name)}/console/timed", Span, query) as pieces:
            yield pieces

    async def console_resize(self, name: str, port: int, columns: int, rows: int) -> None:
        body = {"port": port, "columns": columns, "rows": rows}
        await self.request("POST", f"{_vm(name)}/console/size", body=body)

    @asynccontextmanager
    async def events(self, since: int | None = None) -> AsyncIterator[AsyncIterator[Event]]:
        """The events past `since`, live; the request is open once the block is entered. Ends with the daemon."""
        async with self._lines("/events", Event, {} if since is None else {"since": since}) as events:
            yield events

    @asynccontextmanager
    async def firewall_trace(self, name: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Yields the fate of each packet of a machine, live."""
        async with self._lines(f"{_vm(name)}/firewall/trace", dict[str, Any]) as verdicts:
            yield verdicts

    @asynccontextmanager
    async def _lines(
        self, path: str, type_: type[_T], query: Mapping[str, str | int | float] | None = None
    ) -> AsyncIterator[_JsonLines[_T]]:
        """An answer without end, one JSON object a line."""
        with self._explained("GET", path):
            async with open_exchange(
                self._socket_path, "GET", _target(path, query), token=self._token
            ) as answer:
                if answer.status != 200:
                    raise to_error(answer.status, await answer.read_all())
                yield _JsonLines(answer, type_)

    @asynccontextmanager
    async def capture(
        self, name: str, *, snap: int | None = None, count: int | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """A pcapng file of what passes a network card, in pieces; it runs once the block is entered."""
        query = {key: value for key, value in (("snap", snap), ("count", count)) if value is not None}
        path = f"{_vm(name)}/net/capture"
        with self._explained("GET", path):
            async with open_exchange(
                self._socket_path, "GET", _target(path, query), token=self._token
            ) as answer:
                if answer.status != 200:
                    raise to_error(answer.status, await answer.read_all())
                async with aclosing(_pieces(answer)) as pieces:
                    yield pieces

    @asynccontextmanager
    async def console(
        self, name: str, port: int, *, since: int | None = None, mode: Wish = "write"
    ) -> AsyncIterator[Console]:
        """A console: to write unless somebody else does (`is_writer` tells), only to watch, or to take over."""
        from trio_websocket import (
            ConnectionRejected,
            HandshakeError,
            wrap_client_stream,
        )  # slow, rarely needed

        path = f"/v1{_vm(name)}/console?port={port}&mode={mode}" + (
            "" if since is None else f"&since={since}"
        )
        try:
            stream = await trio.open_unix_socket(self._socket_path)
        except OSError as error:
            with self._explained("GET", path):
                raise Unreachable(error.strerror) from None
        try:
            with errors.one_error():
                async with trio.open_nursery() as nursery, stream:
                    with trio.fail_after(CONNECT_TIMEOUT_S):
                        headers = (
                            [(b"authorization", f"Bearer {self._token}".encode())] if self._token else []
                        )
                        socket = await wrap_client_stream(
                            nursery, stream, "rayos", path, extra_headers=headers
                        )
                    try:
                        console = Console(socket)
                        await console.be_seated()
                        yield console
                    finally:
                        with trio.move_on_after(CLOSE_TIMEOUT_S) as scope:
                            scope.shield = True
                            await socket.aclose()
                        nursery.cancel_scope.cancel()
        except ConnectionRejected as error:
            raise to_error(error.status_code, error.body or b"") from None
        except (HandshakeError, trio.TooSlowError) as error:
            raise errors.GuestGone(f"the console of {name} did not open: {error!r}") from None


class Console:
    """One console of one guest. `writer` is who may write (None: nobody does), `is_writer` whether it is this one; both
    change while it is read, and `on_writer` is called then."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self.offset = 0
        self.is_writer = False
        self.writer: str | None = None
        self.on_writer: Callable[[], object] | None = None

    async def be_seated(self) -> None:
        """Hear who writes, which is said first. Raises GuestGone when the daemon closed it instead."""
        from trio_websocket import ConnectionClosed

        try:
            self._hear(json.loads(await self._socket.get_message()))
        except ConnectionClosed as error:
            raise errors.GuestGone(f"the console was closed: {error.reason}") from None

    def _hear(self, said: dict[str, Any]) -> None:
        if "offset" in said:
            self.offset = int(said["offset"])
            return
        self.is_writer, self.writer = bool(said["is_writer"]), said["writer"]
        if self.on_writer is not None:
            self.on_writer()

    async def take(self) -> None:
        """Become the writer; whoever was watches on. Raises GuestGone when the console has ended."""
        await self._say({"take": True})

    async def write(self, data: bytes) -> None:
        """Input for the guest. Raises GuestGone when the console has ended."""
        from trio_websocket import ConnectionClosed

        try:
            await self._socket.send_message(data)
        except ConnectionClosed:
            raise errors.GuestGone("the console has ended") from None

    async def resize(self, columns: int, rows: int) -> None:
        """The size of the terminal, which counts while it writes. Raises GuestGone when the console has ended."""
        await self._say({"columns": columns, "rows": rows})

    async def _say(self, said: dict[str, Any]) -> None:
        from trio_websocket import ConnectionClosed

        try:
            await self._socket.send_message(json.dumps(said))
        except ConnectionClosed:
            raise errors.GuestGone("the console has ended") from None

    async def read(self) -> bytes:
        """The next bytes the guest wrote; empty once the console has ended. `offset` is then behind them.

        Raises:
            GuestGone: the daemon closed it with a reason.
        """
        from trio_websocket import ConnectionClosed

        while True:
            try:
                message = await self._socket.get_message()
            except ConnectionClosed as error:
                reason = error.reason
                if reason is not None and reason.code == 1008:
                    raise errors.GuestGone(str(reason.reason or "the console was closed")) from None
                return b""
            if isinstance(message, bytes):
                self.offset += len(message)
                return message
            self._hear(json.loads(message))


async def _pieces(answer: Answer) -> AsyncGenerator[bytes, None]:
    while piece := await answer.read():
        yield piece


class _JsonLines(Generic[_T]):
    """The lines of an answer without end."""

    def __init__(self, answer: Answer, type_: type[_T]) -> None:
        self._answer = answer
        self._type = type_
        self._lines: list[bytes] = []
        self._rest = b""

    def __aiter__(self) -> _JsonLines[_T]:
        return self

    async def __anext__(self) -> _T:
        return msgspec.json.decode(await self._line(), type=self._type)

    async def skip(self) -> None:
        """Wait for a line of another kind, the first."""
        with suppress(StopAsyncIteration):
            await self._line()

    async def _line(self) -> bytes:
        while not self._lines:
            try:
                piece = await self._answer.read()
            except Broken:
                piece = b""
            if not piece:
                raise StopAsyncIteration
            *self._lines, self._rest = (self._rest + piece).split(b"\n")
        return self._lines.pop(0)

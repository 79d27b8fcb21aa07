"""The client of the API: what every front end (command line, tests, pytest fixture) uses.

Every call goes by a row of the table of operations. Invariant: an answer that is not a success is raised as the class
of `rayos_vmm.errors` that has its code or status, with the service's message and hint.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar, cast
from urllib.parse import urlencode

import msgspec
import trio

from rayos_vmm import errors
from rayos_vmm.client.console import Console
from rayos_vmm.client.exchange import Answer, Broken, Unreachable, open_exchange
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.contract import answers, asks, operations
from rayos_vmm.contract.operation import JSON, Operation
from rayos_vmm.events import Event
from rayos_vmm.guest.view import ConsolePort, InputDevice
from rayos_vmm.machine.recording import Step
from rayos_vmm.machine.seats import Preference
from rayos_vmm.machine.view import Damage, DiskView, ExecResult, VmView
from rayos_vmm.network.view import Lease
from rayos_vmm.service.view import Info
from rayos_vmm.shared.packet import Stats
from rayos_vmm.shared.timed import Span
from rayos_vmm.shared.view import DisplayInfo, Verdict

CONNECT_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 0.5
# The service keeps the time limits of what it does; beyond them the client allows for the way.
MARGIN_S: Final = 15.0
DEFAULT_TIMEOUT_S: Final = 180.0

_CLASSES: Final[tuple[type[errors.RayosError], ...]] = (
    errors.NotFound,
    errors.Conflict,
    errors.Invalid,
    errors.Forbidden,
    errors.Malformed,
    errors.TooLarge,
    errors.RateLimited,
    errors.Unavailable,
    errors.GuestGone,
    errors.Timeout_,
    errors.Busy,
)
_BY_CODE: Final = {class_.code: class_ for class_ in _CLASSES}
_BY_STATUS: Final = {class_.status: class_ for class_ in reversed(_CLASSES)}

_A = TypeVar("_A")
Verb = Literal["start", "kill", "pause", "resume", "reset"]
_VERBS: Final[Mapping[Verb, Operation[VmView]]] = {
    "start": operations.MACHINES_START,
    "kill": operations.MACHINES_KILL,
    "pause": operations.MACHINES_PAUSE,
    "resume": operations.MACHINES_RESUME,
    "reset": operations.MACHINES_RESET,
}


def _target(path: str, query: Any) -> str:
    """The path with the fields of a query's struct, or of a mapping; those that are None are left out."""
    fields = msgspec.to_builtins(query) if query is not None else {}
    words = {
        key: str(value).lower() if isinstance(value, bool) else value
        for key, value in fields.items()
        if value is not None
    }
    return f"{path}?{urlencode(words)}" if words else path


class NoDaemon(errors.RayosError):
    """Nothing answers on the socket."""

    code = "no_daemon"
    status = 503


def to_error(status: int, body: bytes) -> errors.RayosError:
    """The error that an answer carries."""
    try:
        said = msgspec.json.decode(body, type=answers.Error).error
    except msgspec.DecodeError:
        return errors.RayosError(f"the daemon answered {status} without a reason")
    class_ = _BY_CODE.get(said.code) or _BY_STATUS.get(status, errors.RayosError)
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
        query: Any = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> bytes:
        """The answer's body, of any path below /v1. `body` travels as JSON, `content` as it is."""
        return await self._request(method, f"/v1{path}", body, content, query, timeout_s)

    async def _request(
        self, method: str, path: str, body: Any, content: bytes, query: Any, timeout_s: float
    ) -> bytes:
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

    async def call(
        self,
        row: Operation[_A],
        *names: str,
        query: Any = None,
        body: Any = None,
        content: bytes = b"",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> _A:
        """The answer of an operation, as its row says.

        Args:
            names: in the places of the path's parameters.
            query, body: of the row's structs; the service checks them.
            content: the body of a row that takes bytes.
        """
        path = row.path_for(*names)
        received = await self._request(row.method, path, body, content, query, timeout_s)
        if row.answer is None:
            return cast("_A", None)
        if row.media == JSON:
            return msgspec.json.decode(received, type=row.answer)
        return cast("_A", received)

    @asynccontextmanager
    async def _open(self, row: Operation[Any], *names: str, query: Any = None) -> AsyncIterator[Answer]:
        """An answer without end, whose status is a success."""
        path = row.path_for(*names)
        with self._explained(row.method, path):
            async with open_exchange(
                self._socket_path, row.method, _target(path, query), token=self._token
            ) as answer:
                if answer.status != row.status:
                    raise to_error(answer.status, await answer.read_all())
                yield answer

    @asynccontextmanager
    async def follow(
        self, row: Operation[_A], *names: str, query: Any = None
    ) -> AsyncIterator[AsyncIterator[_A]]:
        """The lines of an answer without end; the request is open once the block is entered."""
        async with self._open(row, *names, query=query) as answer:
            yield _JsonLines(answer, cast("type[_A]", row.answer))

    # -- machines ------------------------------------------------------------------------------------------------

    async def info(self) -> Info:
        return await self.call(operations.MACHINES_INFO)

    async def create(self, spec: VmSpec, *, start: bool = False) -> VmView:
        return await self.call(operations.MACHINES_CREATE, body=asks.Create(spec=spec, start=start))

    async def machines(self) -> list[VmView]:
        return (await self.call(operations.MACHINES_LIST)).vms

    async def get(self, name: str) -> VmView:
        return await self.call(operations.MACHINES_GET, name)

    async def act(self, name: str, verb: Verb) -> VmView:
        return await self.call(_VERBS[verb], name)

    async def stop(self, name: str, *, timeout_s: float = 20.0) -> VmView:
        body = asks.Stop(timeout_s=timeout_s)
        return await self.call(operations.MACHINES_STOP, name, body=body, timeout_s=timeout_s + MARGIN_S)

    async def remove(self, name: str) -> None:
        await self.call(operations.MACHINES_REMOVE, name)

    async def wait(
        self, name: str, condition: Literal["ready", "running", "stopped"], *, timeout_s: float = 60.0
    ) -> VmView:
        query = asks.WaitQuery(for_=condition, timeout_s=timeout_s)
        return await self.call(operations.MACHINES_WAIT, name, query=query, timeout_s=timeout_s + MARGIN_S)

    async def stats(self, name: str) -> Stats:
        return await self.call(operations.MACHINES_STATS, name)

    # -- inside the guest, and QEMU's monitor --------------------------------------------------------------------

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[AsyncIterator[VmView]]:
        """The machine now and after each change. An ephemeral one stays until its last holder leaves, and no longer."""
        async with self.follow(operations.MACHINES_HOLD, name) as views:
            yield views

    async def release(self, name: str) -> None:
        """Lets a machine live on when its holders leave."""
        await self.call(operations.MACHINES_RELEASE, name)

    async def exec(self, name: str, command: str | list[str], *, timeout_s: float = 60.0) -> ExecResult:
        body = asks.Exec(command=command, timeout_s=timeout_s)
        return await self.call(operations.GUEST_EXEC, name, body=body, timeout_s=timeout_s + MARGIN_S)

    async def read_file(self, name: str, path: str) -> bytes:
        return await self.call(operations.GUEST_READ, name, query=asks.FileQuery(path=path))

    async def write_file(self, name: str, path: str, data: bytes, *, mode: int = 0o644) -> None:
        query = asks.PutQuery(path=path, mode=mode)
        await self.call(operations.GUEST_WRITE, name, query=query, content=data)

    async def qmp(self, name: str, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        body = asks.Qmp(command=command, arguments=dict(arguments) if arguments is not None else None)
        return (await self.call(operations.GUEST_QMP, name, body=body)).return_

    async def qmp_transcript(self, name: str) -> str:
        """The QMP conversation of its last run, one JSON object a line."""
        return (await self.call(operations.GUEST_TRANSCRIPT, name)).decode(errors="replace")

    # -- disks and network ---------------------------------------------------------------------------------------

    async def disks(self, name: str) -> list[DiskView]:
        return await self.call(operations.DISK_LIST, name)

    async def resize_disk(self, name: str, size: str, *, disk: int = 0) -> DiskView:
        return await self.call(operations.DISK_RESIZE, name, body=asks.DiskSize(size=size, disk=disk))

    async def leases(self) -> list[Lease]:
        return (await self.call(operations.DHCP_LEASES)).leases

    @asynccontextmanager
    async def firewall_trace(self, name: str) -> AsyncIterator[AsyncIterator[Verdict]]:
        """Follows each packet of a machine, live."""
        async with self.follow(operations.FIREWALL_TRACE, name) as verdicts:
            yield verdicts

    @asynccontextmanager
    async def capture(
        self, name: str, *, snap: int | None = None, count: int | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """A pcapng file of what passes a network card, in pieces; it runs once the block is entered."""
        async with self._open(operations.NET_CAPTURE, name, query={"snap": snap, "count": count}) as answer:
            async with aclosing(_pieces(answer)) as pieces:
                yield pieces

    # -- display and input ---------------------------------------------------------------------------------------

    async def screenshot(self, name: str, *, scanout: int = 0, with_cursor: bool = False) -> bytes:
        query = asks.ScreenshotQuery(scanout=scanout, cursor=with_cursor)
        return await self.call(operations.DISPLAY_SCREENSHOT, name, query=query)

    async def display(self, name: str) -> DisplayInfo:
        """`serial` of the newest change, and `scanouts`."""
        return await self.call(operations.DISPLAY_INFO, name)

    async def resize(self, name: str, width: int, height: int, scanout: int = 0) -> None:
        body = asks.DisplayMode(width=width, height=height, scanout=scanout)
        await self.call(operations.DISPLAY_RESIZE, name, body=body)

    async def wait_damage(
        self, name: str, since: int, scanout: int = 0, *, timeout_s: float = 60.0
    ) -> Damage:
        """Waits for a change of a scanout after serial `since`; raises Timeout_ when there is none."""
        query = asks.DamageQuery(since=since, scanout=scanout, timeout_s=timeout_s)
        return await self.call(operations.DISPLAY_DAMAGE, name, query=query, timeout_s=timeout_s + MARGIN_S)

    async def type_text(self, name: str, text: str, *, layout: str | None = None) -> str:
        """Types; returns which keyboard took it: virtio, ps2 or usb."""
        return (await self.call(operations.INPUT_TYPE, name, body={"text": text, "layout": layout})).to

    async def send_key(self, name: str, combo: str) -> str:
        """Presses keys together; returns which keyboard took them: virtio, ps2 or usb."""
        return (await self.call(operations.INPUT_KEY, name, body=asks.Key(combo=combo))).to

    async def pointer(self, name: str, x: float, y: float, buttons: Sequence[str] = ()) -> None:
        await self.call(operations.INPUT_POINTER, name, body={"x": x, "y": y, "buttons": buttons})

    async def mouse(
        self, name: str, dx: int, dy: int, *, wheel: int = 0, buttons: Sequence[str] = ()
    ) -> None:
        body = {"dx": dx, "dy": dy, "wheel": wheel, "buttons": buttons}
        await self.call(operations.INPUT_MOUSE, name, body=body)

    async def touch(self, name: str, points: Sequence[tuple[float, float]]) -> None:
        await self.call(operations.INPUT_TOUCH, name, body=asks.Touch(points=list(points)))

    async def input_devices(self, name: str) -> list[InputDevice]:
        """Each input device: lights, what is held down, what waits, what was dropped."""
        return (await self.call(operations.INPUT_DEVICES, name)).devices

    async def input_events(self, name: str, device: str, events: Sequence[tuple[int, int, int]]) -> None:
        """Hands evdev events (type, code, value) to a device."""
        body = asks.InputEvents(device=device, events=list(events))
        await self.call(operations.INPUT_EVENTS, name, body=body)

    async def input_replay(self, name: str, steps: Sequence[Step], *, speed: float = 1.0) -> None:
        """Does a recording again; returns when it is done."""
        needed_s = steps[-1].t / speed if steps and speed > 0 else 0.0
        body = asks.Replay(steps=list(steps), speed=speed)
        await self.call(operations.INPUT_REPLAY, name, body=body, timeout_s=needed_s + DEFAULT_TIMEOUT_S)

    @asynccontextmanager
    async def input_record(self, name: str) -> AsyncIterator[AsyncIterator[Step]]:
        """Follows what reaches the input devices, from the block's beginning until the machine ends."""
        async with self._open(operations.INPUT_RECORD, name) as answer:
            lines = _JsonLines(answer, Step)
            await lines.skip()
            yield lines

    # -- events and consoles -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def events(self, since: int | None = None) -> AsyncIterator[AsyncIterator[Event]]:
        """The events past `since`, live; the request is open once the block is entered. Ends with the daemon."""
        async with self.follow(operations.EVENTS_EVENTS, query=asks.EventsQuery(since=since)) as events:
            yield events

    async def console_log(self, name: str, port: int) -> bytes:
        return await self.call(operations.CONSOLE_LOG, name, query=asks.PortQuery(port=port))

    async def console_write(self, name: str, port: int, data: bytes) -> None:
        """Type into a console; returns once the device has taken it.

        Raises:
            Conflict: somebody else writes there.
        """
        await self.call(operations.CONSOLE_WRITE, name, query=asks.PortQuery(port=port), content=data)

    async def console_ports(self, name: str) -> list[ConsolePort]:
        """The ports: number, name, guest_open, columns, rows, writer, watchers."""
        return (await self.call(operations.CONSOLE_PORTS, name)).ports

    @asynccontextmanager
    async def console_pieces(
        self, name: str, port: int, *, since: int = 0, follow: bool = False
    ) -> AsyncIterator[AsyncIterator[Span]]:
        """Yields the kept output of a console with its times; up to now, or on and on."""
        query = asks.TimedQuery(port=port, since=since, follow=follow)
        async with self.follow(operations.CONSOLE_TIMED, name, query=query) as pieces:
            yield pieces

    async def console_resize(self, name: str, port: int, columns: int, rows: int) -> None:
        body = asks.ConsoleSize(port=port, columns=columns, rows=rows)
        await self.call(operations.GUEST_SIZE, name, body=body)

    @asynccontextmanager
    async def console(
        self, name: str, port: int, *, since: int | None = None, mode: Preference = "write"
    ) -> AsyncIterator[Console]:
        """A console: to write unless somebody else does (`is_writer` tells), only to watch, or to take over."""
        from trio_websocket import (
            ConnectionRejected,
            HandshakeError,
            wrap_client_stream,
        )  # slow, rarely needed

        query = asks.StreamQuery(port=port, mode=mode, since=since)
        path = _target(operations.CONSOLE_ATTACH.path_for(name), query)
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


async def _pieces(answer: Answer) -> AsyncGenerator[bytes, None]:
    while piece := await answer.read():
        yield piece


class _JsonLines(Generic[_A]):
    """The lines of an answer without end."""

    def __init__(self, answer: Answer, type_: type[_A]) -> None:
        self._answer = answer
        self._type = type_
        self._lines: list[bytes] = []
        self._rest = b""

    def __aiter__(self) -> _JsonLines[_A]:
        return self

    async def __anext__(self) -> _A:
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

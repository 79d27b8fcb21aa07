"""QMP for trio: `qemu.qmp` (asyncio) behind trio-asyncio, wrapped here and nowhere else.

Invariants: every wait has a time limit; a connection that is lost fails every waiting command with
`GuestGone` at once; a reply line is at most `LINE_MAXIMUM_BYTES`; a flood of events costs the oldest events,
never memory. Source: QEMU, docs/interop/qmp-spec.rst.

`qemu.qmp` itself bounds a line (its `readbuflen`) but not its event queue; a pump empties that queue into
the bounded one here, so it holds what arrives within one turn of the loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import trio
import trio_asyncio  # type: ignore[import-untyped]
from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from rayos_vmm.errors import GuestGone, RayosError, Timeout_, one_error

LINE_MAXIMUM_BYTES: Final = 16 << 20  # the longest replies (query-qmp-schema) have 250 KiB
EVENTS_MAXIMUM: Final = 1024
CONNECT_TIMEOUT_S: Final = 30.0
EXECUTE_TIMEOUT_S: Final = 10.0
TRANSCRIPT_LINES: Final = 500
TRANSCRIPT_CHARACTERS: Final = 2000
_CLOSE_TIMEOUT_S: Final = 2.0

_T = TypeVar("_T")
# The library logs what it raises as well; callers hear it once, as an exception.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class QmpRefused(RayosError):
    """QEMU understood the command and said no; `qmp_class` is its error class."""

    code = "qmp_refused"
    status = 409

    def __init__(self, command: str, qmp_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.qmp_class = qmp_class


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """An event of QEMU: `SHUTDOWN`, `RESET`, `STOP`, …; `time` in seconds since the epoch."""

    name: str
    data: Mapping[str, Any]
    time: float


class Transcript:
    """The last that was said over QMP, one JSON object a line: {"at": unix seconds, "execute" | "return" | "error"
    | "event": …}. What is longer than TRANSCRIPT_CHARACTERS is kept as the beginning of its text.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=TRANSCRIPT_LINES)

    def note(self, kind: str, what: Any) -> None:
        """Keep one message."""
        text = json.dumps(what, default=str)
        if len(text) > TRANSCRIPT_CHARACTERS:
            text = json.dumps(f"{text[:TRANSCRIPT_CHARACTERS]}…")
        self._lines.append(f'{{"at": {time.time():.3f}, "{kind}": {text}}}')

    def text(self) -> str:
        """All that is kept, oldest first."""
        return "".join(f"{line}\n" for line in self._lines)


class Qmp:
    """One connection. Any task may execute; one task at a time reads events."""

    def __init__(self, client: QMPClient, loop: trio_asyncio.TrioEventLoop, transcript: Transcript) -> None:
        self._client = client
        self._transcript = transcript
        self._loop = loop
        self._events: deque[QmpEvent] = deque(maxlen=EVENTS_MAXIMUM)
        self._news = trio.Event()
        self._lost = trio.Event()
        self._handing_over = trio.Lock()
        self.events_dropped = 0

    @property
    def is_lost(self) -> bool:
        """True once QEMU hung up (or died)."""
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        """Returns when the connection is gone."""
        await self._lost.wait()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = EXECUTE_TIMEOUT_S,
    ) -> Any:
        """Executes a command and returns QEMU's answer.

        Cancellation leaves the connection usable; QEMU may still carry the command out.

        Raises:
            QmpRefused: QEMU answered with an error.
            GuestGone: the connection was or is lost; whether the command took effect is unknown.
            Timeout_: no answer within `timeout_s`.
        """
        if self._lost.is_set():
            raise GuestGone(f"QEMU is gone; it cannot execute {command}")
        self._transcript.note("execute", {"command": command, "arguments": dict(arguments or {})})
        with trio.move_on_after(timeout_s):
            try:
                returned = await self._aio(lambda: self._client.execute(command, dict(arguments or {})))
                self._transcript.note("return", returned)
                return returned
            except ExecuteError as error:
                self._transcript.note("error", str(error))
                raise QmpRefused(command, error.error_class, str(error)) from None
            except (ExecInterruptedError, StateError, QMPError, OSError, EOFError):
                raise GuestGone(f"QEMU went away while executing {command}") from None
        raise Timeout_(f"QEMU did not answer {command} within {timeout_s:g} s")

    async def hand_over(self, fd: int, name: str) -> None:
        """Give QEMU a copy of a descriptor, by the name that a command then uses (`getfd`).

        Raises:
            QmpRefused, GuestGone, Timeout_: as `execute`.
        """
        if self._lost.is_set():
            raise GuestGone("QEMU is gone; it takes no descriptor")
        async with self._handing_over:
            try:
                self._client.send_fd_scm(fd)
            except (QMPError, OSError):
                raise GuestGone("QEMU went away while it was handed a descriptor") from None
            await self.execute("getfd", {"fdname": name})

    async def next_event(self) -> QmpEvent:
        """The next event, oldest first; cancellation loses none.

        Raises:
            GuestGone: the connection is lost and every event was read.
        """
        while not self._events:
            if self._lost.is_set():
                raise GuestGone("QEMU is gone; there are no more events")
            await self._news.wait()
        event = self._events.popleft()
        if not self._events and not self._lost.is_set():
            self._news = trio.Event()
        return event

    async def _aio(self, function: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        # The caller may be a task outside of the loop's context (the API's, for one).
        token = trio_asyncio.current_loop.set(self._loop)
        try:
            return await self._loop.run_aio_coroutine(function())  # type: ignore[no-any-return]
        finally:
            trio_asyncio.current_loop.reset(token)

    def _put(self, message: Mapping[str, Any]) -> None:
        self._transcript.note("event", message)
        stamp = message.get("timestamp", {})
        if len(self._events) == EVENTS_MAXIMUM:
            self.events_dropped += 1
        time = float(stamp.get("seconds", 0)) + float(stamp.get("microseconds", 0)) / 1e6
        self._events.append(QmpEvent(str(message.get("event")), message.get("data") or {}, time))
        self._news.set()

    async def _pump(self, listener: EventListener) -> None:
        """Moves events over until the connection is gone; runs as an asyncio task."""
        gone = asyncio.ensure_future(self._wait_gone())
        try:
            while True:
                get = asyncio.ensure_future(listener.get())
                await asyncio.wait((gone, get), return_when=asyncio.FIRST_COMPLETED)
                if get.done():
                    self._put(get.result())
                    continue
                get.cancel()
                for message in listener.clear():
                    self._put(message)
                return
        finally:
            gone.cancel()
            self._lost.set()
            self._news.set()

    async def _wait_gone(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def _close(self) -> None:
        # What it raises is why the connection had ended; `wait_lost` told that it did.
        with suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()


@asynccontextmanager
async def open_qmp(
    path: Path, *, timeout_s: float = CONNECT_TIMEOUT_S, transcript: Transcript | None = None
) -> AsyncIterator[Qmp]:
    """A negotiated connection to the QMP socket at `path`; leaving disconnects and leaves QEMU running.

    What is said over it is kept in `transcript`, when there is one.

    Raises:
        GuestGone: nobody listens there, or it hung up, or it does not speak QMP.
        Timeout_: no greeting within `timeout_s`.
    """
    with one_error():
        async with trio_asyncio.open_loop() as loop:
            client = QMPClient(path.name, readbuflen=LINE_MAXIMUM_BYTES)
            listener = EventListener()
            client.register_listener(listener)
            qmp = Qmp(client, loop, transcript or Transcript())
            with trio.move_on_after(timeout_s) as limit:
                try:
                    await qmp._aio(lambda: client.connect(str(path)))
                except (ConnectError, QMPError, OSError, EOFError) as error:
                    cause = error.exc if isinstance(error, ConnectError) else error
                    raise GuestGone(f"QEMU's QMP socket does not answer: {cause}") from None
            if limit.cancelled_caught:
                raise Timeout_(f"QEMU sent no QMP greeting within {timeout_s:g} s")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(qmp._aio, lambda: qmp._pump(listener))
                try:
                    yield qmp
                finally:
                    with trio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
                        await qmp._aio(qmp._close)
                    nursery.cancel_scope.cancel()

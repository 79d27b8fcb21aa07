"""The guest's agent as a client: commands and files over console port 1.

The conversation is `rayos_images.guest.protocol`'s (no I/O there); this is its clock and its wire. Invariants: one
request at a time; every wait is bounded by the caller; a request that was given up is killed in the guest, at
the latest by the next one's hello. A guest that resets loses its request with `GuestGone`, never silently.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

import trio

from rayos_images.guest.protocol import (
    AgentProtocol,
    AgentState,
    Done,
    Exited,
    Failed,
    FileData,
    ProtocolError,
    Ready,
    Reply,
)
from rayos_vmm.errors import GuestGone, Invalid, NotFound, Timeout_
from rayos_vmm.hardware.protocols import Worker
from rayos_vmm.machine.view import ExecResult
from rayos_vmm.shared.packet import WorkerError, WorkerGone

HELLO_TIMEOUT_S: Final = 20.0  # a guest that is still booting gets this long
FILE_TIMEOUT_S: Final = 120.0
_HELLO_RETRY_S: Final = 2.0
_KILL_TIMEOUT_S: Final = 3.0
_POWER_OFF_TIMEOUT_S: Final = 5.0


class Agent:
    """The agent behind one port of one machine; `run` it in the machine's nursery."""

    def __init__(self, worker: Worker, port: int) -> None:
        self._worker = worker
        self._port = port
        self._protocol = AgentProtocol()
        self._lock = trio.Lock()
        self._reply: Reply | ProtocolError | None = None
        self._replied = trio.Event()
        self._is_mid_piece = False
        self._is_reading = trio.Event()
        self._is_over = False

    async def run(self) -> None:
        """Reads what the guest sends; ends with the worker."""
        try:
            async with self._worker.console_stream(self._port, since=None, hold=True) as chunks:
                self._is_reading.set()
                expected: int | None = None
                async for offset, data in chunks:
                    if expected is not None and offset != expected:
                        lost = offset - expected
                        self._protocol = AgentProtocol()
                        self._take(ProtocolError(f"{lost} bytes of the port were lost"))
                    expected = offset + len(data)
                    try:
                        for reply in self._protocol.receive(data):
                            self._take(reply)
                    except ProtocolError as error:
                        self._take(error)
        except (WorkerGone, WorkerError):
            pass
        finally:
            self._is_over = True
            self._take(ProtocolError("the machine's devices are gone"))

    def guest_was_reset(self) -> None:
        """The guest starts over: a pending request is lost."""
        self._protocol = AgentProtocol()
        self._is_mid_piece = False
        self._take(Ready())

    async def run_command(self, command: str | Sequence[str], *, timeout_s: float) -> ExecResult:
        """A shell line, or a program with its arguments, run in the guest.

        Raises:
            Invalid: the command is empty, too long or holds a NUL.
            Timeout_: it did not end in time, or no agent answered; it was killed.
            GuestGone: the guest was reset, went away, or broke the protocol.
        """
        async with self._conversation(timeout_s):
            with _refusals():
                argv = ["sh", "-c", command] if isinstance(command, str) else list(command)
                _, request = self._protocol.exec(argv)
            try:
                reply = await self._ask([request])
            except trio.Cancelled:
                await self._kill()
                raise
        if isinstance(reply, Exited):
            return ExecResult(exit_status=reply.status, stdout=reply.stdout, stderr=reply.stderr)
        raise _unexpected(reply)

    async def read_file(self, path: str, *, timeout_s: float = FILE_TIMEOUT_S) -> bytes:
        """The contents of a file of the guest.

        Raises:
            NotFound: the guest cannot read it; the message is the guest's.
        """
        async with self._conversation(timeout_s):
            with _refusals():
                _, request = self._protocol.get(path)
            reply = await self._ask([request])
        if isinstance(reply, FileData):
            return reply.data
        raise _unexpected(reply)

    async def write_file(
        self, path: str, data: bytes, mode: int, *, timeout_s: float = FILE_TIMEOUT_S
    ) -> None:
        """Replaces a file in the guest.

        Raises:
            NotFound: the guest cannot write it; the message is the guest's.
        """
        async with self._conversation(timeout_s):
            with _refusals():
                _, parts = self._protocol.put(path, data, mode=mode)
            self._is_mid_piece = True
            reply = await self._ask(parts)
            self._is_mid_piece = False
        if not isinstance(reply, Done):
            raise _unexpected(reply)

    async def power_off(self) -> None:
        """Asks the guest to power itself off; returns when it was asked, heard or not."""
        with trio.move_on_after(_POWER_OFF_TIMEOUT_S):
            try:
                await self.run_command(["poweroff"], timeout_s=_POWER_OFF_TIMEOUT_S)
            except (GuestGone, Timeout_):
                return

    @asynccontextmanager
    async def _conversation(self, timeout_s: float) -> AsyncIterator[None]:
        """Holds the agent, idle, for one request within `timeout_s`."""
        with trio.move_on_after(timeout_s):
            async with self._lock:
                await self._is_reading.wait()
                with trio.move_on_after(HELLO_TIMEOUT_S) as limit:
                    await self._say_hello()
                if limit.cancelled_caught:
                    raise Timeout_(
                        f"the guest's agent did not answer within {HELLO_TIMEOUT_S:g} s",
                        hint="has the guest booted, and does it have RayOS's agent?",
                    )
                try:
                    yield
                except WorkerGone:
                    raise GuestGone("the machine's devices are gone") from None
                except WorkerError as error:
                    raise GuestGone(f"the agent's port does not take data: {error}") from None
            return
        raise Timeout_(f"the guest did not answer within {timeout_s:g} s")

    async def _say_hello(self) -> None:
        """Until the agent answers. All hellos have one nonce, so that a slow guest's late answer to any of them counts,
        and each waits twice as long as the one before: a busy guest is not buried in them.
        """
        nonce, retry_s = secrets.token_hex(16), _HELLO_RETRY_S
        is_resynced = False
        while self._protocol.state is not AgentState.IDLE:
            is_resynced = is_resynced or self._is_mid_piece
            hello = self._protocol.resync(nonce) if self._is_mid_piece else self._protocol.hello(nonce)
            self._is_mid_piece = False
            reply: Reply | None = None
            with trio.move_on_after(retry_s):
                reply = await self._ask([hello])
            if reply is None:
                retry_s *= 2
                self._is_mid_piece = (
                    not is_resynced
                )  # perhaps a former service's: the next hello gets through
            elif isinstance(reply, Ready):
                nonce = secrets.token_hex(
                    16
                )  # another agent, which may hear nothing that was said to the former

    async def _ask(self, parts: Iterable[bytes]) -> Reply:
        self._reply = None
        self._replied = trio.Event()
        for part in parts:
            await self._worker.console_write(self._port, part)
        await self._replied.wait()
        reply = self._reply
        if isinstance(reply, ProtocolError):
            raise GuestGone(f"the guest's agent broke off: {reply}") from None
        return reply or Ready()

    async def _kill(self) -> None:
        # Without the right to the console nobody hears: the guest kills it at the next hello.
        with suppress(WorkerError, WorkerGone), trio.move_on_after(_KILL_TIMEOUT_S, shield=True):
            if self._protocol.state is AgentState.WAITING and not self._is_over:
                self._replied = trio.Event()
                await self._worker.console_write(self._port, self._protocol.kill())
                await self._replied.wait()

    def _take(self, reply: Reply | ProtocolError) -> None:
        self._reply = reply
        self._replied.set()


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns refusals of the protocol into the caller's fault."""
    try:
        yield
    except ValueError as error:
        raise Invalid(str(error)) from None


def _unexpected(reply: Reply) -> NotFound | GuestGone:
    if isinstance(reply, Failed):
        return NotFound(reply.message, code="guest_file")
    if isinstance(reply, Ready):
        return GuestGone("the guest's agent started anew; the request is lost")
    return GuestGone(f"the guest's agent answered {type(reply).__name__}")

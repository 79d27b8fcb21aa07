"""A conversation with one TPM emulator: its control socket, and the data socket that we hand to it.

One control request and one command are on their way at a time. Invariant: an answer was read completely, or the
emulator is lost (also after a cancellation in between) and nothing more is sent to it: the late answer to one
command must never be taken for the answer to the next.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Self

import trio

from rayos_tpm import command, control
from rayos_tpm.errors import CommandFailed, MalformedMessage, TpmError, Unavailable

ANSWER_LIMIT_S: Final = 10.0  # for the host's own commands; the slowest of them takes milliseconds
GUEST_LIMIT_S: Final = 120.0  # RSA key generation takes seconds
_CHUNK: Final = 65536


class Emulator:
    """The two sockets of a running swtpm."""

    def __init__(self, control_socket: trio.socket.SocketType) -> None:
        self._control = control_socket
        self._data: trio.socket.SocketType | None = None
        self._control_lock = trio.Lock()
        self._data_lock = trio.Lock()
        self.is_lost = False

    async def open_data(self) -> Self:
        """Give the emulator its data socket (SET_DATAFD). Call once, first."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._data = trio.socket.from_stdlib_socket(ours)
            descriptor = array.array("i", [theirs.fileno()])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)]
            await self._control.sendmsg(
                [control.ControlRequest(control.Control.SET_DATAFD).pack()], ancillary
            )
            reply = await self._receive_reply(control.Control.SET_DATAFD)
        if control.result(reply) != control.RESULT_OK:
            raise TpmError(f"swtpm refused its data socket with result {control.result(reply):#x}")
        return self

    def close(self) -> None:
        """Close both sockets. Safe to call again."""
        self._control.close()
        if self._data is not None:
            self._data.close()

    def _check(self) -> None:
        if self.is_lost:
            raise Unavailable("swtpm is lost: it did not complete an earlier answer")

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.is_lost = True
            raise

    async def _receive_reply(self, kind: control.Control) -> bytes:
        buffer = b""
        while (length := control.reply_length(kind, buffer)) is None or len(buffer) < length:
            chunk = await self._control.recv(_CHUNK)
            if not chunk:
                raise Unavailable(f"swtpm closed the control channel instead of answering {kind.name}")
            buffer += chunk
        return buffer[:length]

    async def ask(self, request: control.ControlRequest, *, limit_s: float = ANSWER_LIMIT_S) -> bytes:
        """Send a control request and return the whole reply, whatever its result.

        Unavailable: swtpm is gone, or did not answer within limit_s.
        """
        async with self._control_lock:
            self._check()
            try:
                with self._exchange(), trio.fail_after(limit_s):
                    message = request.pack()
                    while message:
                        message = message[await self._control.send(message) :]
                    return await self._receive_reply(request.command)
            except trio.TooSlowError:
                raise Unavailable(
                    f"swtpm did not answer {request.command.name} within {limit_s:g} s"
                ) from None
            except OSError as error:
                raise Unavailable(f"the control channel of swtpm broke ({error.strerror})") from None

    async def order(self, request: control.ControlRequest) -> bytes:
        """As ask, but CommandFailed when the result is not success."""
        reply = await self.ask(request)
        if (code := control.result(reply)) != control.RESULT_OK:
            raise CommandFailed(f"control command {request.command.name}", code)
        return reply

    async def transmit(self, frame: bytes, *, limit_s: float = ANSWER_LIMIT_S) -> bytes:
        """Send one TPM command and return its answer.

        Unavailable: swtpm is gone or did not answer within limit_s; the data socket is unusable then.
        """
        async with self._data_lock:
            data = self._data
            if data is None:
                raise Unavailable("swtpm has no data channel")
            self._check()
            try:
                with self._exchange(), trio.fail_after(limit_s):
                    while frame:
                        frame = frame[await data.send(frame) :]
                    answer = b""
                    while (missing := _missing(answer)) > 0:
                        chunk = await data.recv(missing)
                        if not chunk:
                            raise Unavailable("swtpm closed the data channel instead of answering")
                        answer += chunk
                    return answer
            except trio.TooSlowError:
                raise Unavailable(f"swtpm did not answer a command within {limit_s:g} s") from None
            except OSError as error:
                raise Unavailable(f"the data channel of swtpm broke ({error.strerror})") from None

    async def run(self, code: command.Code, frame: bytes) -> command.Response:
        """Send one of the host's own commands; CommandFailed when the TPM refuses it."""
        return command.checked(code.name, await self.transmit(frame))


def _missing(answer: bytes) -> int:
    """How many bytes of the answer are still to come."""
    if len(answer) < command.HEADER.size:
        return command.HEADER.size - len(answer)
    _, size, _ = command.HEADER.unpack_from(answer)
    if not command.HEADER.size <= size <= command.BUFFER_SIZE:
        raise MalformedMessage(
            f"swtpm announces an answer of {size} bytes; allowed are 10 to {command.BUFFER_SIZE}"
        )
    return int(size) - len(answer)

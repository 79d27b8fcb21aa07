"""Starts TPM processes in a few milliseconds each, by forking a parent that has everything imported.

A fresh Python costs 150 ms, a fork of this one 5: with 64 VMs that is ten seconds against a third of one.
The parent runs no event loop, holds no secret of its own, and ends when the service's end of its socket
closes; its children have sessions of their own and stay. One message starts one child: the descriptors are
configuration, key, QEMU's listener, the control listener and the status file, in this order.
"""

from __future__ import annotations

import array
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from rayos_tpm import process
from rayos_tpm.errors import TpmError
from rayos_tpm.protocol import Config

if TYPE_CHECKING:
    from rayos_tpm.server import Begun

Confine = Callable[[Config], None]

_SOCKET: Final = 3
_DESCRIPTORS: Final = 5
_ANSWER_LIMIT_S: Final = 30.0
_CONFIG_LIMIT: Final = 1 << 20


class Spawner:
    """The service's end of the parent of all TPM processes, which is started again when it is gone. Use open_spawner.

    process: that parent.
    """

    def __init__(self, program: Sequence[str]) -> None:
        self._program = program
        self._lock = trio.Lock()
        self.process, self._socket = self._start()

    def _start(self) -> tuple[process.Process, trio.socket.SocketType]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            with theirs:
                parent = process.spawn(
                    self._program,
                    descriptors={0: null, 1: null, 2: 2, _SOCKET: theirs.fileno()},
                    environ=os.environ,
                )
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(null)
        return parent, trio.socket.from_stdlib_socket(ours)

    async def spawn(
        self,
        config: Config,
        key: bytes,
        qemu_listener: socket.socket,
        control_listener: socket.socket,
        status_fd: int,
    ) -> process.Process:
        """Start a TPM process and return it; its listeners and the status file are the caller's to close.

        TpmError: the spawner is gone, and so is the one that was started in its place, or it could not fork.
        """
        memory = os.memfd_create("rayos-tpm-config", os.MFD_CLOEXEC)
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(key)
            data = memoryview(msgspec.json.encode(config))
            while data:
                data = data[os.write(memory, data) :]
            sent = [memory, read_end, qemu_listener.fileno(), control_listener.fileno(), status_fd]
            async with self._lock:
                answer = await self._ask(array.array("i", sent))
        finally:
            os.close(memory)
            os.close(read_end)
        pid, _, started = answer.partition(b" ")
        if not started:
            raise TpmError(f"the TPM spawner could not start a process: {answer.decode()}")
        return process.Process(int(pid), int(started))

    async def _ask(self, sent: array.array[int]) -> bytes:
        for _ in range(2):
            try:
                with trio.fail_after(_ANSWER_LIMIT_S):
                    await self._socket.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sent)])
                    if answer := await self._socket.recv(64):
                        return answer
                failure = "it ended"
            except (OSError, trio.TooSlowError) as error:
                failure = str(error) or "time is up"
            await self.close()
            self.process, self._socket = self._start()
        raise TpmError(f"the TPM spawner does not answer: {failure}")

    async def close(self) -> None:
        """End the parent; what it started lives on. Cannot be cancelled."""
        self._socket.close()
        with trio.CancelScope(shield=True):
            await self.process.stop()


@asynccontextmanager
async def open_spawner(
    program: Sequence[str] = (sys.executable, "-P", "-m", "rayos_tpm.spawner"),
) -> AsyncIterator[Spawner]:
    """A spawner that lives as long as the context; what it started lives on.

    program: the parent's command line; one that calls main with a confinement of its own.
    """
    spawner = Spawner(program)
    try:
        yield spawner
    finally:
        await spawner.close()


def _serve(sock: socket.socket, confine: Confine) -> None:
    """Fork a child for each message, until the other end closes."""
    space = socket.CMSG_SPACE(_DESCRIPTORS * array.array("i").itemsize)
    while True:
        message, ancillary, _, _ = sock.recvmsg(1, space, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return
        received = array.array("i")
        for _, _, data in ancillary:
            received.frombytes(data)
        try:
            pid = os.fork()
        except OSError as error:
            sock.send(str(error.strerror).encode()[:60])
        else:
            if pid == 0:
                sock.close()
                _run_child(list(received), confine)
            sock.send(f"{pid} {process.start_time(pid)}".encode())
        finally:
            for descriptor in received:
                os.close(descriptor)


def _run_child(received: list[int], confine: Confine) -> None:
    """Become the TPM process of one VM. Does not return."""
    from rayos_tpm.program import LOG_FLAGS
    from rayos_tpm.server import begin, run_server

    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        memory, pipe, qemu, control, status = received
        with os.fdopen(memory, "rb", closefd=True) as file:
            file.seek(0)
            config = msgspec.json.decode(file.read(_CONFIG_LIMIT), type=Config)
        with os.fdopen(pipe, "rb") as file:
            key = file.read(64)
        log = os.open(config.log, LOG_FLAGS, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)  # the service's own output must not be held open by what outlives it
        os.close(log)
        try:
            begun: Begun | TpmError = begin(config, key)
        except TpmError as error:
            begun = error
        confine(config)
        listeners = socket.socket(fileno=qemu), socket.socket(fileno=control)
        trio.run(run_server, config, key, begun, *listeners, status)
        status = 0
    except BaseException:  # the supervisor's boundary: a child must never fall back into the parent's loop
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def stay(_config: Config) -> None:
    """The confinement of a TPM process that is not confined."""


def main(confine: Confine = stay) -> None:
    """The parent's whole life.

    confine: called in each TPM process when its swtpm was started and before it hears anybody; from there on the
        process needs its state directory, the descriptors that it has, and no program.
    """
    import rayos_tpm.server  # noqa: F401  (imported before the first fork: that is the point)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # keys must not reach a core file
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=_SOCKET) as sock:
        _serve(sock, confine)


if __name__ == "__main__":
    main()

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
import select
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
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
_REPORTS: Final = 4
_DESCRIPTORS: Final = 5
_ANSWER_LIMIT_S: Final = 30.0
_REPORT_LIMIT_S: Final = 0.3
_ENDS_LIMIT: Final = 4096
_CONFIG_LIMIT: Final = 1 << 20


class Spawner:
    """The service's end of the parent of all TPM processes, which is started again when it is gone. Use open_spawner.

    process: that parent.
    """

    def __init__(self, program: Sequence[str]) -> None:
        self._program = program
        self._lock = trio.Lock()
        self._ends: dict[int, str] = {}  # how TPM processes ended, by pid
        self._news = trio.Event()
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        heard, reports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            with theirs, reports:
                self.process = process.spawn(
                    self._program,
                    descriptors={
                        0: null,
                        1: null,
                        2: 2,
                        _SOCKET: theirs.fileno(),
                        _REPORTS: reports.fileno(),
                    },
                    environ=os.environ,
                )
        except BaseException:
            ours.close()
            heard.close()
            raise
        finally:
            os.close(null)
        self._socket, self._reports = map(trio.socket.from_stdlib_socket, (ours, heard))

    async def listen(self) -> None:
        """Note how TPM processes end, as their parent saw it. Never returns."""
        while True:
            reports = self._reports
            try:
                report = await reports.recv(64)
            except (OSError, trio.ClosedResourceError):
                report = b""
            if not report:
                if reports is self._reports:
                    await self._restart()
                continue
            pid, _, how = report.decode().partition(" ")
            self._ends[int(pid)] = how
            if len(self._ends) > _ENDS_LIMIT:
                del self._ends[next(iter(self._ends))]
            news, self._news = self._news, trio.Event()
            news.set()

    async def watch(self, tpm: process.Process) -> str:
        """Return when a TPM process has ended: "died of signal 9", "ended with status 1"; or that nobody saw how."""
        await tpm.wait()
        with trio.move_on_after(_REPORT_LIMIT_S):
            while tpm.pid not in self._ends:
                await self._news.wait()
        return self._ends.pop(tpm.pid, "ended, and nobody saw how")

    async def _restart(self) -> None:
        async with self._lock:
            await self._replace()

    async def _replace(self) -> None:
        await self.close()
        self._start()

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
            await self._replace()
        raise TpmError(f"the TPM spawner does not answer: {failure}")

    async def close(self) -> None:
        """End the parent; what it started lives on. Cannot be cancelled."""
        self._socket.close()
        self._reports.close()
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
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spawner.listen)
            yield spawner
            nursery.cancel_scope.cancel()
    finally:
        await spawner.close()


def _serve(sock: socket.socket, reports: socket.socket, confine: Confine) -> None:
    """Fork a child for each message and report how each ends, until the other end closes."""
    children: dict[int, int] = {}  # pid by pidfd
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd in children:
                poll.unregister(fd)
                _bury(reports, children.pop(fd))
                os.close(fd)
                continue
            pid = _fork(sock, [reports.fileno(), *children], confine)
            if pid is None:
                return
            if pid:
                pidfd = os.pidfd_open(pid)
                children[pidfd] = pid
                poll.register(pidfd, select.POLLIN)


def _bury(reports: socket.socket, pid: int) -> None:
    how = process.describe(os.waitpid(pid, 0)[1])
    with suppress(OSError):  # a service that does not listen learns less
        reports.send(f"{pid} {how}".encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _fork(sock: socket.socket, others: list[int], confine: Confine) -> int | None:
    """The child that a message asked for, 0 if there could be none, None at the end."""
    space = socket.CMSG_SPACE(_DESCRIPTORS * array.array("i").itemsize)
    message, ancillary, _, _ = sock.recvmsg(1, space, socket.MSG_CMSG_CLOEXEC)
    if not message:
        return None
    received = array.array("i")
    for _, _, data in ancillary:
        received.frombytes(data)
    try:
        pid = os.fork()
    except OSError as error:
        sock.send(str(error.strerror).encode()[:60])
        return 0
    else:
        if pid == 0:
            sock.close()
            for fd in others:
                os.close(fd)
            _run_child(list(received), confine)
        sock.send(f"{pid} {process.start_time(pid)}".encode())
        return pid
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

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # keys must not reach a core file
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=_SOCKET) as sock, socket.socket(fileno=_REPORTS) as reports:
        _serve(sock, reports, confine)


if __name__ == "__main__":
    main()

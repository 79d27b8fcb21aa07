"""Starts TPM processes in a few milliseconds each, by forking a parent that has everything imported.

A fresh Python costs 150 ms, a fork of this one 5: with 64 VMs that is ten seconds against a third of one.
The parent runs no event loop, holds no secret of its own, and ends when the service's end of its socket
closes; its children have sessions of their own and stay. One message starts one child: the descriptors are
configuration, key, QEMU's listener and the control listener, in this order.
"""

from __future__ import annotations

import array
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import trio

from rayos_tpm import process
from rayos_tpm.errors import TpmError
from rayos_tpm.protocol import Config

_SOCKET: Final = 3
_DESCRIPTORS: Final = 4
_ANSWER_LIMIT_S: Final = 30.0
_CONFIG_LIMIT: Final = 1 << 20


class Spawner:
    """The service's end. Start it with open_spawner.

    process: the parent of the TPM processes; a service that cares waits for its end.
    """

    def __init__(self, sock: trio.socket.SocketType, parent: process.Process) -> None:
        self.process = parent
        self._socket = sock
        self._lock = trio.Lock()

    async def spawn(
        self, config: Config, key: bytes, qemu_listener: socket.socket, control_listener: socket.socket
    ) -> process.Process:
        """Start a TPM process and return it; its listeners are the caller's to close.

        TpmError: the spawner is gone, or could not fork.
        """
        memory = os.memfd_create("rayos-tpm-config", os.MFD_CLOEXEC)
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(key)
            data = memoryview(msgspec.json.encode(config))
            while data:
                data = data[os.write(memory, data) :]
            sent = array.array("i", [memory, read_end, qemu_listener.fileno(), control_listener.fileno()])
            async with self._lock:
                with trio.fail_after(_ANSWER_LIMIT_S):
                    await self._socket.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sent)])
                    answer = await self._socket.recv(64)
        except (OSError, trio.TooSlowError) as error:
            raise TpmError(f"the TPM spawner does not answer: {error or 'time is up'}") from None
        finally:
            os.close(memory)
            os.close(read_end)
        pid, _, started = answer.partition(b" ")
        if not started:
            raise TpmError(f"the TPM spawner could not start a process: {answer.decode() or 'it ended'}")
        return process.Process(int(pid), int(started))


@asynccontextmanager
async def open_spawner() -> AsyncIterator[Spawner]:
    """A spawner that lives as long as the context; what it started lives on."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        with theirs:
            parent = process.spawn(
                [sys.executable, "-P", "-m", "rayos_tpm.spawner"],
                descriptors={0: null, 1: null, 2: 2, _SOCKET: theirs.fileno()},
                environ=os.environ,
            )
    finally:
        os.close(null)
    sock = trio.socket.from_stdlib_socket(ours)
    try:
        yield Spawner(sock, parent)
    finally:
        sock.close()
        with trio.CancelScope(shield=True):
            await parent.stop()


def _serve(sock: socket.socket) -> None:
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
                _run_child(list(received))
            sock.send(f"{pid} {process.start_time(pid)}".encode())
        finally:
            for descriptor in received:
                os.close(descriptor)


def _run_child(received: list[int]) -> None:
    """Become the TPM process of one VM. Does not return."""
    from rayos_tpm.program import LOG_FLAGS
    from rayos_tpm.server import run_server

    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        memory, pipe, qemu, control = received
        with os.fdopen(memory, "rb", closefd=True) as file:
            file.seek(0)
            config = msgspec.json.decode(file.read(_CONFIG_LIMIT), type=Config)
        with os.fdopen(pipe, "rb") as file:
            key = file.read(64)
        log = os.open(config.log, LOG_FLAGS, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)  # the service's own output must not be held open by what outlives it
        os.close(log)
        trio.run(run_server, config, key, socket.socket(fileno=qemu), socket.socket(fileno=control))
        status = 0
    except BaseException:  # the supervisor's boundary: a child must never fall back into the parent's loop
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def main() -> None:
    """The parent's whole life."""
    import rayos_tpm.server  # noqa: F401  (imported before the first fork: that is the point)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # keys must not reach a core file
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=_SOCKET) as sock:
        _serve(sock)


if __name__ == "__main__":
    main()

"""Finding the daemon, or starting one that ends by itself when nothing needs it any more.

The new daemon reports through a pipe: `ready` once its socket answers, or the error that ended it, so that
nobody polls and the user reads the real reason.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
import trio

from rayos_vmm import errors
from rayos_vmm.client.client import Client, NoDaemon, to_error
from rayos_vmm.contract.answers import Error, ErrorBody
from rayos_vmm.paths import Paths, default_paths, private

READY: Final = b"ready\n"
KEEP: Final = b"k"
START_TIMEOUT_S: Final = 30.0


def the_daemon() -> Client:
    """The client of the daemon that the environment names, with the token that it names."""
    path = Path(os.environ.get("RAYOS_SOCKET") or default_paths().api_socket)
    return Client(path, os.environ.get("RAYOS_TOKEN", ""))


def report_ready(fd: int) -> None:
    """Tells whoever started this daemon that its socket answers."""
    with suppress(BrokenPipeError):
        os.write(fd, READY)
    os.close(fd)


def report_error(fd: int, error: errors.RayosError) -> None:
    """Tells whoever started this daemon why it ends."""
    body = Error(error=ErrorBody(code=error.code, message=error.message, hint=error.hint))
    with suppress(BrokenPipeError):
        os.write(fd, error.status.to_bytes(2, "big") + msgspec.json.encode(body))
    os.close(fd)


def log_path(paths: Paths) -> Path:
    """Where a daemon in the background writes its log."""
    return paths.state / "daemon.log"


def _environment(paths: Paths) -> dict[str, str]:
    return {
        "RAYOS_STATE_DIR": str(paths.state),
        "RAYOS_RUNTIME_DIR": str(paths.runtime),
        "RAYOS_CACHE_DIR": str(paths.cache),
    }


async def _read_report(fd: int) -> bytes:
    report = bytearray()
    async with trio.lowlevel.FdStream(fd) as stream:
        # Not to the end of the stream alone: what the daemon starts may hold the pipe as well.
        while report != READY and (piece := await stream.receive_some()):
            report += piece
    return bytes(report)


def spawn_daemon(
    paths: Paths, arguments: list[str], report_fd: int, owner_fd: int = -1
) -> subprocess.Popen[bytes]:
    """Starts `rayos serve` in a session of its own; it inherits the environment and these descriptors alone."""
    paths.create()
    inherited = [report_fd]
    if owner_fd >= 0:
        inherited.append(owner_fd)
        arguments = ["--owner-fd", str(owner_fd), *arguments]
    command = [
        sys.executable,
        "-P",
        "-m",
        "rayos_vmm.cli",
        "serve",
        "--report-fd",
        str(report_fd),
        *arguments,
    ]
    with open(log_path(paths), "ab", opener=private) as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=inherited,
            start_new_session=True,
            cwd="/",
            env={**os.environ, **_environment(paths)},
        )


async def start_daemon(paths: Paths, arguments: list[str], *, owner_fd: int = -1) -> subprocess.Popen[bytes]:
    """A new daemon whose socket answers.

    Args:
        owner_fd: the reading end of a pipe. When its last writer is gone, the daemon ends with all its machines and
            removes the directory that holds its state; a byte in it (`KEEP`) lets the daemon live on.

    Raises:
        RayosError: why it could not start.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        process = spawn_daemon(paths, arguments, writer, owner_fd)
    finally:
        os.close(writer)
    report = b""
    with trio.move_on_after(START_TIMEOUT_S):
        report = await _read_report(reader)
    if report == READY:
        return process
    process.kill()
    process.wait()
    if len(report) > 2:
        raise to_error(int.from_bytes(report[:2], "big"), report[2:])
    raise NoDaemon("the daemon did not start", hint=f"its log says why: {log_path(paths)}")


async def ensure_daemon(arguments: list[str]) -> Client:
    """The daemon that runs, else a new one with these `serve` arguments that ends when it is idle.

    Raises:
        RayosError: none runs and none could be started.
    """
    paths = default_paths()
    client = the_daemon()
    try:
        await client.machines()
        return client
    except NoDaemon:
        if os.environ.get("RAYOS_SOCKET"):  # somebody else's, which is not ours to start
            raise
    async with _one_at_a_time(paths):
        try:
            await client.machines()  # another client was a moment faster
            return client
        except NoDaemon:
            pass
        try:
            process = await start_daemon(paths, ["--exit-when-idle", *arguments])
        except errors.Busy:
            # Somebody's `rayos serve` was faster; theirs answers, or the error is true.
            await client.machines()
            return client
    # It lives on without us: not a child to be waited for.
    process.returncode = 0
    return client


@asynccontextmanager
async def _one_at_a_time(paths: Paths) -> AsyncIterator[None]:
    """Keeps other clients from starting a daemon meanwhile; they wait until the socket of ours answers."""
    paths.create()
    with log_path(paths).open("ab") as log:
        await trio.to_thread.run_sync(fcntl.flock, log, fcntl.LOCK_EX, abandon_on_cancel=True)
        yield

"""The API on its unix socket.

Invariant: the path leads to a live daemon or to nothing. A socket that a crashed daemon left is replaced in
one step (bind beside it, rename over it); one that answers is never taken away from its daemon.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from rayos_vmm.api.app import create_app
from rayos_vmm.api.guard import PEER, peer_of
from rayos_vmm.api.http.limits import STRANGER_DEADLINES, Deadlines, Lobby
from rayos_vmm.api.http.listening import Caller, Listening
from rayos_vmm.errors import Busy, Invalid

if TYPE_CHECKING:
    from rayos_vmm.service.service import Service

GRACE_S: Final = 1.0  # how long open requests and streams may go on after the shutdown was asked for
BACKLOG: Final = 1024


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except TimeoutError:
            return True  # somebody holds it and does not accept: not ours to take
    return True


def _identity(path: Path) -> tuple[int, int, int]:
    # With the time: an inode number is given out again as soon as it is free.
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_ctime_ns


@contextmanager
def open_socket(path: Path, *, mode: int = 0o600) -> Iterator[socket.socket]:
    """A listening socket at `path`, removed at the end if it is still ours.

    Raises:
        Busy: a daemon answers there.
        Invalid: something other than a socket is there.
    """
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise Invalid(f"{path} exists and is not a socket", hint="move it away, or set RAYOS_RUNTIME_DIR")
        if _answers(path):
            raise Busy(
                f"another daemon answers on {path}",
                hint="use it (`rayos ps`), stop it, or set RAYOS_RUNTIME_DIR and RAYOS_STATE_DIR",
            )
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(beside))
        beside.chmod(mode)
        listener.listen(BACKLOG)
        beside.rename(path)
        ours = _identity(path)
        try:
            yield listener
        finally:
            with suppress(FileNotFoundError):
                if _identity(path) == ours:
                    path.unlink()


async def serve_api(
    service: Service,
    path: Path,
    *,
    shared: Path | None = None,
    shutdown: Callable[[], Awaitable[None]],
    deadlines: Deadlines = STRANGER_DEADLINES,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until `shutdown` returns, then lets requests finish for `GRACE_S`.

    Args:
        shared: another socket, that every user of the host may connect to.
        deadlines: of users other than the owner.

    Raises:
        Busy, Invalid: as `open_socket`.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(open_socket(path))]
        if shared is not None:
            sockets.append(stack.enter_context(open_socket(shared, mode=0o666)))
        lobby = Lobby((0, os.geteuid()))
        listening = Listening(
            create_app(service), lobby, service.connections, _caller_of, deadlines=deadlines
        )
        # Connections may go on for a while after nobody is let in any more.
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for sock in sockets:
                    accepting.start_soon(listening.accept, trio.socket.from_stdlib_socket(sock), connections)
                task_status.started()
                await shutdown()
                accepting.cancel_scope.cancel()
            listening.idle.end()
            connections.cancel_scope.deadline = trio.current_time() + GRACE_S


def _caller_of(sock: trio.socket.SocketType) -> Caller:
    peer = peer_of(sock)
    return Caller(peer.uid, {PEER: peer})

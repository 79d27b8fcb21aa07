"""The API on its unix socket.

Invariant: the path leads to a live daemon or to nothing. A socket that a crashed daemon left is replaced in
one step (bind beside it, rename over it); one that answers is never taken away from its daemon.
"""

from __future__ import annotations

import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app
from starlette.types import ASGIApp, Receive, Scope, Send

from rayos_vmm.api.app import create_app
from rayos_vmm.api.guard import PEER, peer_of
from rayos_vmm.errors import Busy, Invalid

if TYPE_CHECKING:
    from rayos_vmm.service.service import Service

GRACE_S: Final = 1.0  # how long open requests and streams may go on after the shutdown was asked for
WEBSOCKET_MESSAGE_MAXIMUM_BYTES: Final = 1 << 20
BACKLOG: Final = 128


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
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until `shutdown` returns, then lets requests finish for `GRACE_S`.

    Args:
        shared: another socket, that every user of the host may connect to.

    Raises:
        Busy, Invalid: as `open_socket`.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(open_socket(path))]
        if shared is not None:
            sockets.append(stack.enter_context(open_socket(shared, mode=0o666)))
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets]
        handler = _Connections(create_app(service))
        # Connections may go on for a while after nobody is let in any more.
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:

                async def end() -> None:
                    await shutdown()
                    accepting.cancel_scope.cancel()

                accepting.start_soon(end)
                task_status.started()
                await trio.serve_listeners(handler.serve, listeners, handler_nursery=connections)
            await handler.context.terminated.set()
            connections.cancel_scope.deadline = trio.current_time() + GRACE_S


class _Connections:
    """Speaks HTTP with each that connects, and tells the application who it is.

    Hypercorn's own accept loop has no place for that, so the loop is ours and the protocol its.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._config = Config()
        self._config.graceful_timeout = GRACE_S
        self._config.websocket_max_message_size = WEBSOCKET_MESSAGE_MAXIMUM_BYTES
        self._config.keep_alive_timeout = 60.0
        self._config.include_server_header = False
        self._config.loglevel = "ERROR"
        self.context = WorkerContext(None)

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection, until either side ends it."""
        peer = peer_of(stream.socket)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope[PEER] = peer
            await self._app(scope, receive, send)

        wrapped = wrap_app(cast("Any", app), self._config.wsgi_max_body_size, "asgi")
        await TCPServer(wrapped, self._config, self.context, ConnectionState({}), cast("Any", stream))

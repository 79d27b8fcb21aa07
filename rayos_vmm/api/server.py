"""The API on its unix socket.

Invariant: the path leads to a live daemon or to nothing. A socket that a crashed daemon left is replaced in
one step (bind beside it, rename over it); one that answers is never taken away from its daemon.
"""

from __future__ import annotations

import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import trio
from hypercorn.config import Config, Sockets
from hypercorn.trio import serve

from rayos_vmm.api.app import create_app
from rayos_vmm.errors import Busy, Invalid

if TYPE_CHECKING:
    from rayos_vmm.service import Service

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
def open_socket(path: Path) -> Iterator[socket.socket]:
    """A listening socket at `path`, mode 0600, removed at the end if it is still ours.

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
        beside.chmod(0o600)
        listener.listen(BACKLOG)
        beside.rename(path)
        ours = _identity(path)
        try:
            yield listener
        finally:
            with suppress(FileNotFoundError):
                if _identity(path) == ours:
                    path.unlink()


class _Config(Config):
    """Hypercorn lets children inherit its sockets: a guest's QEMU would hold ours, and outlive us with it."""

    def create_sockets(self) -> Sockets:
        sockets = super().create_sockets()
        for sock in (*sockets.insecure_sockets, *sockets.secure_sockets, *sockets.quic_sockets):
            sock.set_inheritable(False)
        return sockets


async def serve_api(
    service: Service,
    path: Path,
    *,
    shutdown: Callable[[], Awaitable[None]],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until `shutdown` returns, then lets requests finish for `GRACE_S`.

    Raises:
        Busy, Invalid: as `open_socket`.
    """
    with open_socket(path) as listener:
        config = _Config()
        config.bind = [f"fd://{listener.fileno()}"]
        config.graceful_timeout = GRACE_S
        config.websocket_max_message_size = WEBSOCKET_MESSAGE_MAXIMUM_BYTES
        config.keep_alive_timeout = 60.0
        config.include_server_header = False
        config.loglevel = "ERROR"
        listener.detach()  # the server owns and closes the descriptor from here on
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await serve(cast("Any", create_app(service)), config, shutdown_trigger=shutdown, mode="asgi")
                nursery.cancel_scope.cancel()

            nursery.start_soon(run)
            task_status.started()

"""Serve one backend alone on a unix socket, for any VMM or tool that speaks vhost-user.

    python -P -m rayos_devices.serve blk --socket S --image F [--read-only] [--direct] [--serial TEXT] [--queues N]
    python -P -m rayos_devices.serve blk --socket S --image F --nbd
    python -P -m rayos_devices.serve net --socket S (--tap NAME | --echo | --sink | --join S2) [--queues N]
    python -P -m rayos_devices.serve gpu --socket S [--mode WxH] [--scanouts N]
    python -P -m rayos_devices.serve input --socket S [--kind keyboard|mouse|tablet|touch]
    python -P -m rayos_devices.serve console --socket S

`--nbd` serves a client of NBD, such as QEMU's controllers, and `--stream` QEMU's `-netdev stream`, in place of a
vhost-user frontend.
`--join` serves a second network device on S2: two guests, each other's network, without a tap between them.
As qemu-storage-daemon and the rust-vmm daemons are used; unlike most of them it listens again when the frontend left.
Memory may be any file that can be mapped, sealed or not. Why a session ended is told on standard error.
`rayos device serve` is the same.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.bucket import TokenBucket
from rayos_devices.errors import DeviceError
from rayos_devices.kind import DeviceOptions, Front
from rayos_devices.kinds import KINDS
from rayos_devices.loop import Loop
from rayos_devices.vhost_user.connection import Connection
from rayos_devices.vhost_user.lost_memory import LostMemory

log = logging.getLogger(__name__)

_BACKLOG: Final = 1
#: What a terminal is told of frontends that come and go.
_LINES_PER_SECOND: Final = 5.0
_LINES_BURST: Final = 50.0


class Listener:
    """Accepts one frontend at a time for `backend`; the next may connect when the one before left.

    A second one is closed at once, which tells it, and the operator reads so. Memory need not be sealed
    (`vhost_user/lost_memory.py`).
    """

    def __init__(self, backend: Backend, loop: Loop, listening: socket.socket) -> None:
        self._backend = backend
        self._loop = loop
        self._listening = listening
        self._connection: Connection | None = None
        self._lines = TokenBucket(_LINES_PER_SECOND, _LINES_BURST, now=loop.now())
        self._untold = 0
        listening.setblocking(False)
        loop.register(listening.fileno(), self._accept)

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        if self._connection is not None:
            self._connection.catch_up()  # it may have left already
        if self._connection is not None:
            sock.close()
            self._say("a second frontend was closed: one is connected, and one is served at a time")
            return
        self._connection = Connection(
            sock, self._backend, self._loop, self._closed, must_be_sealed=False, on_refusal=self._refused
        )

    def _refused(self, reason: str) -> None:
        self._say(f"request refused: {reason}")

    def _closed(self, reason: str) -> None:
        self._say(f"session ended: {reason}")
        self._connection = None

    def _say(self, sentence: str) -> None:
        """One line at the terminal, unless frontends come and go faster than anybody reads."""
        if self._lines.wait(self._loop.now()) > 0.0:
            self._untold += 1
            return
        self._lines.take(1)
        more = f" ({self._untold} lines before this one were left out)" if self._untold else ""
        self._untold = 0
        log.info("%s: %s%s", self._backend.name, sentence, more)

    def lose(self, address: int) -> None:
        """A page at an address in this process is gone: the session that had it ends."""
        if self._connection is not None:
            self._connection.lose(address)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close("shutting down")
        self._loop.unregister(self._listening.fileno())
        self._listening.close()


def listen(path: Path) -> socket.socket:
    """A listening unix socket at `path` (mode 0600); a dead one that is in the way is replaced.

    Errors: DeviceError when something alive listens there, or the path is no socket.
    """
    if path.exists() or path.is_symlink():
        if not path.is_socket():
            raise DeviceError(f"{path} exists and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise DeviceError(f"{path} is in use by a running backend")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(before)
    sock.listen(_BACKLOG)
    return sock


def front(arguments: argparse.Namespace, backend: Backend, loop: Loop, listening: socket.socket) -> Front:
    """Serves a backend on its socket: to vhost-user frontends, or to whom was asked for in their place."""
    accept = KINDS[arguments.device].accept
    if arguments.accepts and accept is not None:
        return accept(backend, DeviceOptions(name=backend.name), [listening], loop)[0]
    return Listener(backend, loop, listening)


def build_all(arguments: argparse.Namespace, loop: Loop) -> list[tuple[Path, Backend]]:
    """Builds the backends that the command line describes, and says where each is served. Errors: DeviceError,
    OSError.
    """
    return KINDS[arguments.device].serve(arguments, loop)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="rayos device serve", description="Serve one virtio device over vhost-user."
    )
    devices = top.add_subparsers(dest="device", required=True)
    for kind in KINDS.values():
        device = devices.add_parser(kind.name, help=kind.summary)
        device.add_argument("--socket", type=Path, required=True, help="unix socket to listen on")
        device.set_defaults(accepts=False)
        kind.add_serve_options(device)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    loop = Loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.stop())
    try:
        served = build_all(arguments, loop)
        listeners = [front(arguments, backend, loop, listen(path)) for path, backend in served]
    except (DeviceError, OSError) as error:
        print(f"rayos device serve: {error}", file=sys.stderr)
        return 1
    for path, backend in served:
        print(f"serving {backend.name} on {path}", file=sys.stderr, flush=True)

    def lose(address: int) -> None:
        for listener in listeners:
            if isinstance(listener, Listener):
                listener.lose(address)

    lost_memory = LostMemory(loop, lose)
    try:
        loop.run()
    finally:
        for listener, (path, backend) in zip(listeners, served, strict=True):
            listener.close()
            backend.close()
            path.unlink(missing_ok=True)
        lost_memory.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
from rayos_devices.blk.backend import BlkBackend
from rayos_devices.blk.nbd import NbdPort
from rayos_devices.bucket import TokenBucket
from rayos_devices.errors import DeviceError
from rayos_devices.loop import Loop
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.port import EchoPort, NetPort, SinkPort, join_ports, open_tap, tap_ports
from rayos_devices.net.stream import StreamPort
from rayos_devices.standard_io import join_events, join_terminal
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


def front(
    arguments: argparse.Namespace, backend: Backend, loop: Loop, listening: socket.socket
) -> Listener | NbdPort | StreamPort:
    """Serves a backend on its socket: to vhost-user frontends, or to whom was asked for in their place."""
    if isinstance(backend, BlkBackend) and arguments.nbd:
        return NbdPort(backend, listening, loop)
    if isinstance(backend, NetBackend) and arguments.stream:
        return StreamPort(backend, listening, loop)
    return Listener(backend, loop, listening)


def build_all(arguments: argparse.Namespace, loop: Loop) -> list[tuple[Path, Backend]]:
    """Builds the backends that the command line describes, and says where each is served. Errors: DeviceError,
    OSError.
    """
    if arguments.device == "net" and arguments.join:
        cables = [join_ports() for _ in range(arguments.queues)]
        return [
            (path, NetBackend(f"net{end}", loop, *ports, rate_bytes_per_second=arguments.rate))
            for end, (path, ports) in enumerate(
                zip((arguments.socket, arguments.join), zip(*cables, strict=True), strict=True)
            )
        ]
    return [(arguments.socket, build(arguments, loop))]


def build(arguments: argparse.Namespace, loop: Loop) -> Backend:
    """One backend. Errors: DeviceError, OSError."""
    match arguments.device:
        case "blk":
            from rayos_devices.blk.store import RawStore

            mode = os.O_RDONLY if arguments.read_only else os.O_RDWR
            image = os.open(arguments.image, mode | os.O_CLOEXEC)
            store = RawStore(image, read_only=arguments.read_only, is_direct=arguments.direct)
            poll_ns = int(arguments.poll_us * 1000)
            return BlkBackend(
                "blk", loop, store, serial=arguments.serial, queues=arguments.queues, poll_ns=poll_ns
            )
        case "net":
            return NetBackend("net", loop, *_ports(arguments), rate_bytes_per_second=arguments.rate)
        case "gpu":
            from rayos_devices.gpu.backend import GpuBackend

            width, height = arguments.mode
            return GpuBackend("gpu", loop, width=width, height=height, scanouts=arguments.scanouts)
        case "input":
            from rayos_devices.input.backend import InputBackend

            device = InputBackend("input", loop, arguments.kind)
            join_events(device, loop)
            return device
        case _:
            from rayos_devices.console.backend import ConsoleBackend
            from rayos_devices.console.port import PortSpec

            console = ConsoleBackend("console", loop, ports=[PortSpec("console", is_console=True)])
            join_terminal(console, loop)
            return console


def _ports(arguments: argparse.Namespace) -> Sequence[NetPort]:
    if arguments.tap:
        return tap_ports(open_tap(arguments.tap, arguments.queues))
    return [EchoPort() if arguments.echo else SinkPort() for _ in range(arguments.queues)]


def _mode(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mode: such as 1920x1080")
    return int(width), int(height)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="rayos device serve", description="Serve one virtio device over vhost-user."
    )
    devices = top.add_subparsers(dest="device", required=True)
    for name in ("blk", "net", "gpu", "input", "console"):
        device = devices.add_parser(name)
        device.add_argument("--socket", type=Path, required=True, help="unix socket to listen on")
        if name == "blk":
            device.add_argument("--image", type=Path, required=True, help="raw file or block device")
            device.add_argument("--read-only", action="store_true")
            device.add_argument("--nbd", action="store_true", help="speak NBD, not vhost-user")
            device.add_argument("--direct", action="store_true", help="past the page cache (O_DIRECT)")
            device.add_argument("--serial", default="", help="up to 20 bytes")
            device.add_argument("--queues", type=int, choices=range(1, 17), default=1, metavar="1..16")
        elif name == "net":
            port = device.add_mutually_exclusive_group(required=True)
            port.add_argument("--tap", help="name of the tap to create or attach to")
            device.add_argument(
                "--stream", action="store_true", help="speak QEMU's -netdev stream, not vhost-user"
            )
            port.add_argument("--echo", action="store_true", help="send every frame back")
            port.add_argument("--sink", action="store_true", help="take every frame")
            port.add_argument("--join", type=Path, help="socket of a second device: each other's network")
            device.add_argument(
                "--queues", type=int, choices=range(1, 17), default=1, metavar="1..16", help="pairs"
            )
            device.add_argument(
                "--rate", type=float, help="bytes a second, each direction; default unbounded"
            )
        elif name == "gpu":
            device.add_argument(
                "--mode", type=_mode, default=(1280, 800), metavar="WxH", help="such as 1920x1080"
            )
            device.add_argument("--scanouts", type=int, choices=range(1, 17), default=1, metavar="1..16")
        elif name == "input":
            kinds = ("keyboard", "mouse", "tablet", "touch")
            device.add_argument(
                "--kind", choices=kinds, default="keyboard", help="events: JSON on standard input"
            )
        if name in ("blk", "net"):
            device.add_argument(
                "--poll-us", type=float, default=0.0, help="look for work so long before sleeping; default 0"
            )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    loop = Loop()
    if arguments.device == "net":
        loop.set_polling(arguments.poll_us * 1e-6)
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

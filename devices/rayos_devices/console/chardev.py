"""The same ports for a QEMU that has no vhost-user console: each behind a socket chardev of QEMU's own virtconsole.

QEMU is the device then, and connects to a listening unix stream socket a port (`reconnect-ms` keeps it trying: a worker
may be replaced). History, back-pressure, log and counters are the console's; what a stream cannot have: a worker killed
between sending and saving sends the last chunk again, and a size is not told.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from rayos_devices.console.backend import ConsoleBackend
from rayos_devices.loop import READ, WRITE, Loop

_CHUNK_BYTES: Final = 64 << 10


class ChardevPort:
    """Serves one port of `console` on a listening socket, to one QEMU at a time; the socket stays the caller's."""

    def __init__(self, console: ConsoleBackend, port: int, listening: socket.socket, loop: Loop) -> None:
        self._console = console
        self._port = port
        self._listening = listening
        self._loop = loop
        self._sock: socket.socket | None = None
        self._is_blocked = False
        listening.setblocking(False)
        loop.register(listening.fileno(), self._accept)

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        self.disconnect()  # QEMU connects again when its former connection is gone, whether we saw that or not
        sock.setblocking(False)
        self._sock = sock
        self._is_blocked = False
        self._loop.register(sock.fileno(), self._ready)
        self._console.connect(self._port, self._send)

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._unblock()
        if events & ~(READ | WRITE):
            self._receive()  # to the end, also without room: it is told again and again
        elif events & READ:
            if self._console.room(self._port) >= _CHUNK_BYTES:
                self._receive()
            else:
                self._listen()

    def _receive(self) -> None:
        if self._sock is None:
            return
        try:
            data = self._sock.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._console.feed(self._port, data)
        else:
            self.disconnect()

    def _send(self) -> None:
        """As much as the socket takes; the rest when it is writable again."""
        sock = self._sock
        if sock is None:
            return
        self._listen()
        if self._is_blocked:
            return
        pieces = [piece for piece in self._console.waiting(self._port) if len(piece)]
        if not pieces:
            return
        try:
            size = sock.sendmsg(pieces, [], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._is_blocked = True
            self._listen()
            return
        except OSError:
            self.disconnect()
            return
        self._console.took(self._port, size)
        self._loop.call_soon(self._send)

    def _unblock(self) -> None:
        if self._sock is not None and self._is_blocked:
            self._is_blocked = False
            self._send()

    def _listen(self) -> None:
        """For bytes while there is room for them, for room on the socket while it is full."""
        if self._sock is not None:
            wanted = READ if self._console.room(self._port) >= _CHUNK_BYTES else 0
            self._loop.modify(self._sock.fileno(), wanted | (WRITE if self._is_blocked else 0))

    def disconnect(self) -> None:
        """Drop the connection, if there is one; QEMU connects again."""
        if self._sock is None:
            return
        self._loop.unregister(self._sock.fileno())
        self._sock.close()
        self._sock = None
        self._console.connect(self._port, None)

    def close(self) -> None:
        self.disconnect()
        with suppress(ValueError):
            self._loop.unregister(self._listening.fileno())


def serve_chardevs(
    console: ConsoleBackend, listening: Sequence[socket.socket], loop: Loop
) -> list[ChardevPort]:
    """A ChardevPort for each port of `console`, in their order."""
    return [ChardevPort(console, port, sock, loop) for port, sock in enumerate(listening)]

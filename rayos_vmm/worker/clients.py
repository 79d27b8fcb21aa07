"""The connections of one listening packet socket: accepted up to a limit, each packet handed on, all on a loop."""

from __future__ import annotations

import socket
from collections.abc import Callable

from rayos_devices.loop import Loop
from rayos_vmm.shared import packet
from rayos_vmm.shared.packet import Head


class Clients:
    """`answer(fd, head, data)` gets each packet; False ends the connection, and so does a packet that is none.

    `sockets` are the live connections by descriptor; `on_close(fd)` is told when one has ended.
    """

    def __init__(
        self,
        loop: Loop,
        listening: socket.socket,
        limit: int,
        answer: Callable[[int, Head, bytes], bool],
        on_close: Callable[[int], None] = lambda _fd: None,
    ) -> None:
        self.sockets: dict[int, socket.socket] = {}
        self._loop = loop
        self._listening = listening
        self._limit = limit
        self._answer = answer
        self._on_close = on_close
        listening.setblocking(False)
        loop.register(listening.fileno(), self._accept)

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        if len(self.sockets) >= self._limit:
            sock.close()
            return
        sock.setblocking(False)
        fd = sock.fileno()
        self.sockets[fd] = sock
        self._loop.register(fd, lambda _events: self._receive(fd))

    def _receive(self, fd: int) -> None:
        try:
            data = self.sockets[fd].recv(packet.MAX_PACKET_BYTES)
            head, payload = packet.decode(data) if data else ({}, b"")
        except BlockingIOError:
            return
        except (OSError, ValueError):
            data, head, payload = b"", {}, b""
        if not data or not self._answer(fd, head, payload):
            self.close(fd)

    def close(self, fd: int) -> None:
        """End one connection."""
        self._loop.unregister(fd)
        self.sockets.pop(fd).close()
        self._on_close(fd)

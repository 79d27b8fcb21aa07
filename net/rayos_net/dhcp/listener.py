"""Where datagrams to a server's UDP port come in: one socket on a plain link, one for each port of a bridge (trio).

A port of a bridge has a socket of its own, so a datagram's port is certain whatever addresses a guest forges,
and a flood fills that port's receive buffer and nobody else's. Each is served by a task of its own, a small
batch a turn; a port that used up its rate rests until it may send again, and what it sent meanwhile is thrown
away unread.

Invariant: the sockets follow the ports that the kernel tells of; a port's socket is closed when it leaves.
"""

import errno
import logging
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import trio

from rayos_net.dhcp import packet_socket
from rayos_net.dhcp.packet_socket import LinkGone
from rayos_net.dhcp.ports import PortWatch

log = logging.getLogger(__name__)

BATCH: Final = 32  # datagrams of a plain link handled before other tasks get a turn
PORT_BATCH: Final = 8  # likewise of a port: the turns of many ports stay short
PORT_BUFFER_SIZE: Final = 128 << 10  # some 100 datagrams, more than a port's burst; thrown away fast
_DISCARD_MAX: Final = 1024

Take = Callable[[bytes, str], float]  # a frame and its port; returns the seconds that the port has to rest
AfterBatch = Callable[[], float]  # after a batch; returns the seconds until the next one


class Listener:
    """The sockets on `link` and what reads them. `take` is given each frame to UDP port `number` and the bridge's
    port, "" on a plain link. With `is_port` the link is itself a port of a bridge, and read before the bridge.
    """

    def __init__(
        self,
        link: str,
        number: int,
        *,
        is_limited: bool,
        is_port: bool = False,
        take: Take,
        after_batch: AfterBatch,
        discarded: Callable[[int], None],
    ) -> None:
        self.link = link
        self._number = number
        self._is_limited = is_limited
        self._is_port = is_port
        self._take = take
        self._after_batch = after_batch
        self._discarded = discarded
        self._watch: PortWatch
        self._plain: socket.socket | None = None
        self._tasks: dict[int, tuple[str, trio.CancelScope]] = {}

    def open(self, stack: ExitStack) -> None:
        """Open what is there. Raises LinkGone, or OSError without CAP_NET_RAW."""
        try:
            self._watch = stack.enter_context(PortWatch(self.link))
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ENXIO):
                raise LinkGone(error.errno, f"there is no link {self.link}") from error
            raise
        if self._is_port:
            opened = packet_socket.open_udp_on_port(self.link, self._number, buffer_size=self._buffer_size())
            self._plain = stack.enter_context(opened)
        elif not self._watch.is_bridge:
            self._plain = stack.enter_context(packet_socket.open_udp(self.link, self._number))

    async def run(self) -> None:
        """Read until cancelled. Raises LinkGone when the link was removed."""
        async with trio.open_nursery() as nursery:
            if self._plain is not None:
                nursery.start_soon(self._read, self._plain, self.link if self._is_port else "", self._batch())
            while True:
                if self._watch.is_gone:
                    raise LinkGone(errno.ENODEV, "the link was removed")
                if self._plain is None:
                    self._follow(nursery)
                await trio.lowlevel.wait_readable(self._watch.socket)
                self._watch.read()

    def _follow(self, nursery: trio.Nursery) -> None:
        ports = self._watch.ports
        for index in [one for one, (name, _) in self._tasks.items() if ports.get(one) != name]:
            self._tasks.pop(index)[1].cancel()
        for index, name in ports.items():
            if index not in self._tasks:
                scope = trio.CancelScope()
                self._tasks[index] = (name, scope)
                nursery.start_soon(self._serve_port, name, scope)

    async def _serve_port(self, name: str, scope: trio.CancelScope) -> None:
        with scope:
            try:
                sock = packet_socket.open_udp_on_port(name, self._number, buffer_size=self._buffer_size())
            except LinkGone:
                return  # the kernel tells it too
            except OSError as error:
                why = {
                    "udp_port": self._number,
                    "link": self.link,
                    "port": name,
                    "error": str(error.strerror),
                }
                log.error("A port of the bridge is not served", extra=why)
                return
            with sock:
                await self._read(sock, name, self._batch())

    def _buffer_size(self) -> int:
        return PORT_BUFFER_SIZE if self._is_limited else packet_socket.RECEIVE_BUFFER_SIZE

    def _batch(self) -> int:
        is_alone = self._plain is not None and not self._is_port
        return PORT_BATCH if self._is_limited and not is_alone else BATCH

    async def _read(self, sock: socket.socket, port: str, batch: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(sock)
            rest = 0.0
            for _ in range(batch):
                try:
                    data = sock.recv(65535)
                except OSError:
                    break  # nothing more; or the link is down, and comes back or is removed
                rest = self._take(data, port)
                if rest:
                    self._discarded(_discard(sock))
                    break
            pause = max(rest, self._after_batch())
            if pause:
                await trio.sleep(pause)


def _discard(sock: socket.socket) -> int:
    for number in range(_DISCARD_MAX):
        try:
            sock.recv(1)
        except OSError:
            return number
    return _DISCARD_MAX

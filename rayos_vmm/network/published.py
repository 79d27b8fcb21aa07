"""Ports of the host that are a guest's: each connection is taken here and carried to the guest's address.

So a guest's server is reached from where its network is not, and a script's `hostfwd` has something to become. By
default only the host itself reaches it. The guest's firewall sees connections of the host's.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from rayos_vmm.errors import Busy

log: Final = logging.getLogger(__name__)

#: Connections of one machine at a time; more wait in the listener's queue.
MAX_CONNECTIONS: Final = 64
_CONNECT_TIMEOUT_S: Final = 10.0
_CHUNK_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Published:
    """One port: where the host listens, and the guest's own port."""

    host: str
    host_port: int
    guest_port: int


def parse_published(text: str) -> Published:
    """`8080:80`, or `0.0.0.0:8080:80`.

    Raises:
        ValueError: a port is not 1 to 65535.
    """
    *where, host_port, guest_port = text.split(":")
    ports = int(host_port), int(guest_port)
    if not all(1 <= port <= 65535 for port in ports):
        raise ValueError(f"{text!r}: ports from 1 to 65535 are allowed")
    return Published(where[0] if where else "127.0.0.1", *ports)


@asynccontextmanager
async def open_published(
    ports: Sequence[Published], address: Callable[[], str | None]
) -> AsyncIterator[None]:
    """Carries connections while the block runs; `address()` is the guest's now, None while it has none.

    Raises:
        Busy: a port is taken, or may not be listened on.
    """
    async with trio.open_nursery() as nursery:
        limit = trio.CapacityLimiter(MAX_CONNECTIONS)
        for port in ports:
            try:
                (listener,) = await trio.open_tcp_listeners(port.host_port, host=port.host)
            except OSError as error:
                raise Busy(
                    f"net.publish: {port.host}:{port.host_port} cannot be listened on: {error.strerror}",
                    code="port_in_use",
                ) from None
            nursery.start_soon(_serve, listener, address, port.guest_port, limit)
        yield
        nursery.cancel_scope.cancel()


async def _serve(
    listener: trio.SocketListener, address: Callable[[], str | None], port: int, limit: trio.CapacityLimiter
) -> None:
    async with listener, trio.open_nursery() as nursery:
        while True:
            stream = await listener.accept()
            await limit.acquire_on_behalf_of(stream)
            nursery.start_soon(_carry, stream, address(), port, limit)


async def _carry(
    stream: trio.SocketStream, address: str | None, port: int, limit: trio.CapacityLimiter
) -> None:
    """One connection, from its beginning to both ends of it; without a guest that takes it, it is closed."""
    try:
        async with stream:
            if address is None:
                return
            try:
                with trio.fail_after(_CONNECT_TIMEOUT_S):
                    guest = await trio.open_tcp_stream(address, port)
            except (OSError, trio.TooSlowError) as error:
                log.debug("a guest took no connection", extra={"port": port, "why": str(error)})
                return
            async with guest, trio.open_nursery() as nursery:
                nursery.start_soon(_pump, stream, guest)
                nursery.start_soon(_pump, guest, stream)
    finally:
        limit.release_on_behalf_of(stream)


async def _pump(source: trio.SocketStream, target: trio.SocketStream) -> None:
    try:
        while data := await source.receive_some(_CHUNK_BYTES):
            await target.send_all(data)
        await target.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
        await trio.aclose_forcefully(source)
        await trio.aclose_forcefully(target)

"""The DHCP server on a real link: packet sockets, clock and disk around `rayos_net.dhcp.server` (trio).

Invariant: an ACK leaves only after its lease is on stable storage; ACKs that come together share one sync
(group commit), and while a sync runs others are received and offered.

Datagrams are received by packet sockets (`rayos_net.dhcp.listener`), which see the sender's hardware address and
need no address on either side; an ordinary UDP socket holds port 67 and sends to relay agents and to clients
that answer ARP (RFC 2131, 4.1).
"""

import errno
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import trio

from rayos_net.dhcp import frame, packet_socket
from rayos_net.dhcp.answer import BROADCAST, Reply, Route
from rayos_net.dhcp.binding import Binding, LeaseEvent
from rayos_net.dhcp.clock import Clock
from rayos_net.dhcp.config import SubnetConfig
from rayos_net.dhcp.exchange import Exchange
from rayos_net.dhcp.listener import Listener
from rayos_net.dhcp.pace import BURST, Pace
from rayos_net.dhcp.packet_socket import LinkGone
from rayos_net.dhcp.server import Server
from rayos_net.dhcp.server_action import Action, Commit, Probe, Send, Source, Tell
from rayos_net.dhcp.store import LeaseStore, StoreError

log = logging.getLogger(__name__)

BATCH: Final = 32  # ARP packets handled before other tasks get a turn
PENDING_MAX: Final = 4096  # ACKs that may wait for the disk; beyond, requests are dropped and come again
_LOG_EVERY_SECONDS: Final = 10.0


class DhcpError(RuntimeError):
    """The DHCP server can't start or go on; the text says why and what to do."""


class DhcpService:
    """A running server, as `serve_dhcp` hands it out. Call it from the trio thread."""

    def __init__(
        self,
        link: str,
        server: Server,
        store: LeaseStore,
        events: Callable[[LeaseEvent], None] | None,
        committed: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.link = link
        self._server = server
        self._store = store
        self._events = events
        self._committed = committed
        self._clock = Clock()
        self._pending: list[Commit] = []
        self._has_pending = trio.Event()
        self._armed: float | None = None
        self._timer_changed = trio.Event()
        self._logged: dict[str, float] = {}
        self._udp: socket.socket
        self._raw: socket.socket
        self._arp: socket.socket
        self._hardware = b""
        self._sent = 0  # replies of this turn
        self._offers, self._acks = Pace(), Pace()
        config = server.config
        self._own = int(config.server)
        self._everyone = (BROADCAST, int(config.network.broadcast_address))
        self._listener = Listener(
            link,
            frame.SERVER_PORT,
            is_limited=config.limits.requests_per_second is not None,
            take=self._take,
            after_batch=self._after_batch,
            discarded=partial(server.count, "drop_rate_limited"),
        )

    @property
    def counters(self) -> dict[str, int]:
        """How often each thing happened since the start (a copy)."""
        return dict(self._server.counters)

    def leases(self) -> list[Binding]:
        """All bindings by address, also offered, released, expired and quarantined ones."""
        return self._server.leases()

    def exchanges(self) -> list[Exchange]:
        """The last exchanges of each port, the oldest first."""
        return self._server.exchanges.list()

    def reserve(self, mac: str, address: IPv4Address, *, host_name: str = "") -> None:
        """Keep `address` for `mac` from now on; it wins over a lease that another client has, at that one's
        renewal.

        Raises ConfigError when either does not fit the subnet.
        """
        config = self._server.config
        config.check_reservation(mac, address)
        self._server.pools[0].reserve(bytes.fromhex(mac.replace(":", "")), int(address))
        if host_name:
            self._server.set_host_name(mac, host_name)

    def unreserve(self, mac: str) -> bool:
        """Give up the reservation of `mac`; return whether there was one. Its lease goes on."""
        self._server.set_host_name(mac, "")
        return self._server.pools[0].unreserve(bytes.fromhex(mac.replace(":", "")))

    def release(self, address: IPv4Address) -> bool:
        """Take the lease of `address` back; return whether there was one. Its client is refused when it
        renews.
        """
        actions = self._server.release(int(address), self._clock.now())
        self._perform(actions)
        return bool(actions)

    def open(self, stack: ExitStack) -> None:
        """Open the sockets. Raises DhcpError with what is in the way."""
        config = self._server.config
        try:
            self._listener.open(stack)
            self._raw = stack.enter_context(packet_socket.open_sender(self.link))
            self._arp = stack.enter_context(packet_socket.open_arp(self.link))
            self._udp = stack.enter_context(
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            )
            packet_socket.refuse_input(self._udp)
            self._udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            self._udp.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.link.encode())
            self._udp.bind((str(config.server), frame.SERVER_PORT))
        except LinkGone as error:
            raise DhcpError(f"DHCP on {self.link}: {error.strerror}") from error
        except OSError as error:
            raise DhcpError(f"DHCP on {self.link}: {_why(error, config)}") from error
        self._hardware = packet_socket.hardware_address(self._raw)

    async def run(self) -> None:
        """Serve until cancelled. Raises DhcpError when the link is removed."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._receive)
                nursery.start_soon(self._receive_arp)
                nursery.start_soon(self._run_timer)
                nursery.start_soon(self._commit)
        except BaseExceptionGroup as group:
            raise single(group) from group

    async def _receive(self) -> None:
        try:
            await self._listener.run()
        except* LinkGone as group:
            raise DhcpError(f"DHCP on {self.link}: the link was removed") from group

    def _take(self, data: bytes, port: str) -> float:
        server, now = self._server, self._clock.now()
        name = port or data[6:12].hex(":")  # on a plain link each hardware address stands for itself
        wait = server.admit(name, now)
        if wait:
            return wait if port else 0.0
        seen = frame.datagram(data, frame.SERVER_PORT)
        if seen is None or (seen.destination != self._own and seen.destination not in self._everyone):
            server.count("drop_not_for_us")
        else:
            source = Source(name, seen.destination == self._own, seen.hardware if port else None)
            self._perform(server.receive(seen.payload, source, now))
        return 0.0

    def _after_batch(self) -> float:
        self._arm()
        # Only for replies: what is dropped must not hold up the others.
        sent, self._sent = self._sent, 0
        return self._offers.pause(sent, self._clock.now())

    async def _receive_arp(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._arp)
            for _ in range(BATCH):
                try:
                    seen = frame.arp(self._arp.recv(2048))
                except BlockingIOError:
                    break
                except OSError as error:
                    self._link_trouble(error)
                    break
                if seen is not None and seen.sender:
                    self._perform(self._server.conflict(seen.sender, seen.sender_hardware, self._clock.now()))
            self._arm()

    async def _run_timer(self) -> None:
        while True:
            self._timer_changed = trio.Event()
            self._armed = self._server.deadline()
            wait = float("inf") if self._armed is None else max(0.0, self._armed - self._clock.now())
            with trio.move_on_after(wait):
                await self._timer_changed.wait()
            self._perform(self._server.handle_timer(self._clock.now()))

    def _arm(self) -> None:
        deadline = self._server.deadline()
        if deadline is not None and (self._armed is None or deadline < self._armed):
            self._timer_changed.set()

    async def _commit(self) -> None:
        while True:
            await self._has_pending.wait()
            self._has_pending = trio.Event()
            batch, self._pending = self._pending, []
            try:
                await trio.to_thread.run_sync(self._store.write, [one.binding for one in batch])
            except StoreError as error:
                # No ACK for these: the clients ask again. What they hold from before stays valid.
                self._server.count("store_failures")
                self._log_seldom("Leases could not be stored", error=str(error), leases=len(batch))
                continue
            self._server.count("commits")
            # Told first: who guards the port must know the address before its guest uses it.
            if self._events is not None:
                for one in batch:
                    if one.event is not None:
                        self._events(one.event)
            if self._committed is not None:
                await self._committed()
            for at in range(0, len(batch), BURST):
                replies = [one.reply for one in batch[at : at + BURST] if one.reply is not None]
                for reply in replies:
                    self._send(reply)
                pause = self._acks.pause(len(replies), self._clock.now())
                if pause:
                    await trio.sleep(pause)

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(reply):
                    self._sent += 1
                    self._send(reply)
                case Commit():
                    if len(self._pending) >= PENDING_MAX:
                        self._server.count("drop_commit_queue_full")
                        continue
                    self._pending.append(action)
                    self._has_pending.set()
                case Probe(ip):
                    self._transmit(self._arp, frame.arp_frame(self._hardware, 0, ip))
                case Tell(event):
                    if self._events is not None:
                        self._events(event)

    def _send(self, reply: Reply) -> None:
        # To a client on this link a frame needs no ARP, which its system may not answer yet.
        is_remote = reply.route is Route.UNICAST and not self._server.pools[0].contains(reply.ip)
        if reply.route is Route.RELAY or is_remote:
            port = frame.SERVER_PORT if reply.route is Route.RELAY else frame.CLIENT_PORT
            try:
                self._udp.sendto(reply.data, (socket.inet_ntoa(reply.ip.to_bytes(4, "big")), port))
            except OSError as error:
                self._send_failed(error)
            return
        own = int(self._server.config.server)
        self._transmit(
            self._raw,
            frame.udp_frame(
                self._hardware,
                reply.hardware,
                own,
                reply.ip,
                frame.SERVER_PORT,
                frame.CLIENT_PORT,
                reply.data,
            ),
        )

    def _transmit(self, sock: socket.socket, data: bytes) -> None:
        try:
            sock.send(data)
        except OSError as error:
            self._send_failed(error)

    def _send_failed(self, error: OSError) -> None:
        # As on a lossy wire: the client asks again.
        self._server.count("send_failures")
        self._log_seldom("A DHCP reply could not be sent", error=str(error.strerror))

    def _link_trouble(self, error: OSError) -> None:
        try:
            socket.if_nametoindex(self.link)
        except OSError:
            raise DhcpError(f"DHCP on {self.link}: the link was removed") from error
        self._log_seldom("The link of the DHCP server is down", error=str(error.strerror))

    def _log_seldom(self, message: str, **fields: object) -> None:
        now = time.monotonic()
        if now - self._logged.get(message, -_LOG_EVERY_SECONDS) >= _LOG_EVERY_SECONDS:
            self._logged[message] = now
            log.warning(message, extra={"link": self.link, **fields})


async def serve_dhcp(
    link: str,
    subnet: SubnetConfig,
    *,
    store: Path,
    events: Callable[[LeaseEvent], None] | None = None,
    committed: Callable[[], Awaitable[None]] | None = None,
    remote: tuple[SubnetConfig, ...] = (),
    task_status: trio.TaskStatus[DhcpService] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve DHCP for `subnet` on `link` until cancelled; with nursery.start() the DhcpService is the result.

    `store` is the lease file, made when absent. `events` is called in the trio thread after each stored
    change; `committed` is awaited after those of a group and before its ACKs leave. `remote` are subnets behind
    relay agents. Closes everything it opened; after cancellation no unsent ACK stays behind. Raises DhcpError
    when the link is missing or removed, not permitted, or the lease file is in use.
    """
    server = Server(subnet, remote=remote)
    with ExitStack() as stack:
        try:
            leases = stack.enter_context(LeaseStore(store))
        except StoreError as error:
            raise DhcpError(str(error)) from error
        if leases.set_aside is not None:
            log.warning("The lease file was damaged and is set aside", extra={"path": str(leases.set_aside)})
        server.restore(leases.read())
        service = DhcpService(link, server, leases, events, committed)
        service.open(stack)
        task_status.started(service)
        await service.run()


def single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The DhcpError when the group holds nothing else: several tasks may fail for one reason. Else the group."""
    _, others = group.split(DhcpError)
    error: BaseException = group
    while others is None and isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _why(error: OSError, config: SubnetConfig) -> str:
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return "not permitted; CAP_NET_RAW and CAP_NET_BIND_SERVICE (or root) are needed"
        case errno.EADDRNOTAVAIL:
            return f"the host has no address {config.server}; give it to the link first"
        case errno.EADDRINUSE:
            return "another server has port 67; stop it or bind it to its own link"
    return str(error.strerror)

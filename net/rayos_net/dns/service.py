"""The zone on a real link: packet sockets, rate limits and the host's resolver around `rayos_net.dns.zone` (trio).

Guests' queries come in as DHCP's do (`rayos_net.dhcp.listener`): a socket for each port of the bridge, its rate
limited before anything is read. An ordinary UDP socket holds port 53 and answers the host's own processes.
Names that are not ours are refused, or asked of `resolver`, a bounded number at a time, the way they were asked of
us. What comes over TCP is read by `rayos_net.dns.stream`.
"""

import errno
import logging
import secrets
import socket
from contextlib import ExitStack, suppress
from functools import partial
from ipaddress import IPv4Address
from typing import Final

import trio
from dnslib import RCODE  # type: ignore[import-untyped]

from rayos_net.dhcp import frame, packet_socket
from rayos_net.dhcp.bucket import Buckets
from rayos_net.dhcp.clock import Clock
from rayos_net.dhcp.listener import Listener
from rayos_net.dhcp.packet_socket import LinkGone
from rayos_net.dns.stream import Reply, Streams, frame_of, read_message
from rayos_net.dns.zone import HEADER_SIZE, Query, Zone, refusal

log = logging.getLogger(__name__)

PORT: Final = 53
RATE_PER_SECOND: Final = 100.0
BURST: Final = 100
ASKING_MAX: Final = 64  # questions open at the resolver
ASKING_PER_PORT: Final = 8
RESOLVER_SECONDS: Final = 4.0  # less than a client's own 5 s
PAYLOAD_MAX: Final = (
    1472  # an Ethernet frame's worth; of a longer answer only the question is left (RFC 2181, 9)
)
_TRUNCATED: Final = 0x02  # the TC bit, in the third byte of the header
_HOST: Final = "host"  # the port name of this host's own processes


class DnsError(RuntimeError):
    """Names can't be served; the text says why and what to do."""


class DnsService:
    """A running DNS server, as `serve_dns` hands it out; `zone` is what it says. Use it in the trio thread."""

    def __init__(self, link: str, zone: Zone, server: IPv4Address, resolver: IPv4Address | None) -> None:
        self.link = link
        self.zone = zone
        self.counters: dict[str, int] = {}
        self._server = server
        self._resolver = resolver
        self._clock = Clock()
        self._buckets = Buckets(RATE_PER_SECOND, BURST)
        self._asking: dict[str, int] = {}
        self._nursery: trio.Nursery
        self._udp: socket.socket
        self._raw: socket.socket
        self._hardware = b""
        self._listener = Listener(
            link,
            PORT,
            is_limited=True,
            take=self._take,
            after_batch=lambda: 0.0,
            discarded=partial(self._count, "rate_limited"),
        )
        self._streams = Streams(server, zone.network, PORT, self._admit, self._handle_stream, self._count)

    def open(self, stack: ExitStack) -> None:
        """Open the sockets. Raises DnsError with what is in the way."""
        try:
            self._listener.open(stack)
            self._raw = stack.enter_context(packet_socket.open_sender(self.link))
            self._udp = stack.enter_context(
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            )
            packet_socket.accept_from_this_host(self._udp)
            self._udp.bind((str(self._server), PORT))
            self._streams.open(stack)
        except OSError as error:
            raise DnsError(f"DNS on {self.link}: {_why(error, self._server)}") from error
        self._hardware = packet_socket.hardware_address(self._raw)

    async def run(self) -> None:
        """Serve until cancelled, or until the link is removed."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._serve_host)
            nursery.start_soon(self._streams.run)
            try:
                await self._listener.run()
            except* LinkGone:
                log.warning("DNS ends with its link", extra={"link": self.link})
                nursery.cancel_scope.cancel()

    def _take(self, data: bytes, port: str) -> float:
        name = port or data[6:12].hex(":")
        wait = self._buckets.take(name, self._clock.now())
        if wait:
            self._count("rate_limited")
            return wait if port else 0.0
        seen = frame.datagram(data, PORT)
        if seen is None or seen.destination != int(self._server) or seen.hardware[0] & 1:
            self._count("not_for_us")
        elif IPv4Address(seen.source) not in self.zone.network or seen.source == seen.destination:
            self._count("foreign_source")
        else:
            self._handle(seen.payload, name, partial(self._send, seen))
        return 0.0

    async def _serve_host(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._udp)
            try:
                data, sender = self._udp.recvfrom(65535)
            except OSError:
                continue  # BlockingIOError, or an earlier answer that was refused
            self._handle(data, _HOST, partial(self._send_to_host, sender))

    def _admit(self, client: str) -> float:
        wait = self._buckets.take(client, self._clock.now())
        if wait:
            self._count("rate_limited")
        return wait

    def _handle_stream(self, data: bytes, client: str, reply: Reply) -> bool:
        return self._handle(data, client, reply, is_stream=True)

    def _handle(self, data: bytes, port: str, reply: Reply, *, is_stream: bool = False) -> bool:
        query = self.zone.read(data)
        if query is None:
            self._count("malformed")
            return False
        if query.is_ours or self._resolver is None:
            self._count("answered" if query.is_ours else "refused")
            reply(self.zone.answer(query))
        elif self._asking.get(port, 0) >= ASKING_PER_PORT or sum(self._asking.values()) >= ASKING_MAX:
            self._count("resolver_busy")
            reply(refusal(query, RCODE.SERVFAIL))
        else:
            self._asking[port] = self._asking.get(port, 0) + 1
            self._nursery.start_soon(self._ask, data, query, port, reply, is_stream)
        return True

    async def _ask(self, data: bytes, query: Query, port: str, reply: Reply, is_stream: bool) -> None:
        try:
            with trio.move_on_after(RESOLVER_SECONDS):
                answer = await (self._resolve_stream(data) if is_stream else self._resolve(data))
                self._count("resolved")
                reply(answer if is_stream or len(answer) <= PAYLOAD_MAX else _cut(query))
                return
            self._count("resolver_silent")
            reply(refusal(query, RCODE.SERVFAIL))
        except OSError as error:
            self._count("resolver_unreachable")
            log.debug("The resolver can't be reached", extra={"error": str(error.strerror)})
            reply(refusal(query, RCODE.SERVFAIL))
        finally:
            self._asking[port] -= 1
            if not self._asking[port]:
                del self._asking[port]

    async def _resolve(self, data: bytes) -> bytes:
        # A socket and a number of its own for each: both have to be guessed (RFC 5452, 4).
        number = secrets.token_bytes(2)
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect((str(self._resolver), PORT))
            await sock.send(number + data[2:])
            while True:
                answer: bytes = await sock.recv(65535)
                if len(answer) < HEADER_SIZE or answer[:2] != number or not answer[2] & 0x80:
                    continue
                return data[:2] + answer[2:]

    async def _resolve_stream(self, data: bytes) -> bytes:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            await sock.connect((str(self._resolver), PORT))
            stream = trio.SocketStream(sock)
            answer = None
            with suppress(trio.BrokenResourceError):
                await stream.send_all(frame_of(data))
                answer = await read_message(stream, bytearray())
            if answer is None or len(answer) < HEADER_SIZE or answer[:2] != data[:2] or not answer[2] & 0x80:
                raise OSError(errno.EPROTO, "the resolver's answer is none")
            return answer

    def _send(self, seen: frame.Datagram, payload: bytes) -> None:
        own = int(self._server)
        data = frame.udp_frame(
            self._hardware, seen.hardware, own, seen.source, PORT, seen.source_port, payload
        )
        try:
            self._raw.send(data)
        except OSError:
            self._count("send_failures")  # as on a lossy wire: the client asks again

    def _send_to_host(self, sender: tuple[str, int], payload: bytes) -> None:
        try:
            self._udp.sendto(payload, sender)
        except OSError:
            self._count("send_failures")

    def _count(self, what: str, by: int = 1) -> None:
        self.counters[what] = self.counters.get(what, 0) + by


async def serve_dns(
    link: str,
    zone: Zone,
    server: IPv4Address,
    *,
    resolver: IPv4Address | None = None,
    task_status: trio.TaskStatus[DnsService] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `zone` at `server` on `link` until cancelled; with nursery.start() the DnsService is the result.

    Returns when the link is removed. Closes everything it opened. Raises DnsError when the link is missing, not
    permitted, or another server has the port.
    """
    service = DnsService(link, zone, server, resolver)
    with ExitStack() as stack:
        service.open(stack)
        task_status.started(service)
        await service.run()


def _cut(query: Query) -> bytes:
    answer = bytearray(refusal(query, RCODE.NOERROR))
    answer[2] |= _TRUNCATED
    return bytes(answer)


def _why(error: OSError, server: IPv4Address) -> str:
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return "not permitted; CAP_NET_RAW and CAP_NET_BIND_SERVICE (or root) are needed"
        case errno.EADDRNOTAVAIL:
            return f"the host has no address {server}; give it to the link first"
        case errno.EADDRINUSE:
            return f"another server has port {PORT} of {server}; stop it or bind it to its own addresses"
    return str(error.strerror)

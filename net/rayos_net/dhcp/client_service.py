"""A DHCP client on a real link (trio): sockets, clock and random numbers around `rayos_net.dhcp.client`.

It may speak for a hardware address other than the link's (a VM's, on the bridge of its uplink), so it
listens to all frames for port 68 and sends whole frames. It sets no address on the link: the caller is told
what to use.
"""

import random
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from typing import Final

import trio

from rayos_net.dhcp import frame, packet_socket
from rayos_net.dhcp.client import Client
from rayos_net.dhcp.client_action import Acquired, ClientConfig, Informed, Lost, Output, SendArp, Transmit
from rayos_net.dhcp.client_state import ClientState
from rayos_net.dhcp.clock import Clock
from rayos_net.dhcp.lease import Lease

BATCH: Final = 64

Told = Acquired | Lost | Informed


class DhcpClient:
    """A running client, as `run_client` hands it out. Call it from the trio thread."""

    def __init__(
        self,
        client: Client,
        clock: Clock,
        raw: socket.socket,
        arp: socket.socket,
        events: Callable[[Told], None],
    ) -> None:
        self._client = client
        self._clock = clock
        self._raw = raw
        self._arp = arp
        self._events = events
        self._changed = trio.Event()
        self._hardware = client.config.hardware
        self._watched: int | None = None
        self.send_failures = 0
        self._watch()

    @property
    def state(self) -> ClientState:
        """Where the client is."""
        return self._client.state

    @property
    def lease(self) -> Lease | None:
        """The lease in use; its times are seconds since the epoch."""
        return self._client.lease

    def renew(self) -> None:
        """Renew now rather than at half time."""
        self._perform(self._client.renew(self._clock.now()))

    def release(self) -> None:
        """Give the lease back; the client then rests until `start`."""
        self._perform(self._client.release(self._clock.now()))

    def decline(self) -> None:
        """The address is in use by another host: give it back as unfit and get another one."""
        self._perform(self._client.decline(self._clock.now()))

    def start(self, stored: Lease | None = None) -> None:
        """Begin, or begin again after `release`."""
        self._perform(self._client.start(self._clock.now(), stored=stored))

    def inform(self, address: IPv4Address) -> None:
        """Ask for parameters for an address that was set otherwise."""
        self._perform(self._client.inform(address, self._clock.now()))

    def history(self) -> list[dict[str, object]]:
        """The last 16 transactions, the oldest first."""
        return [
            {
                "at": one.started,
                "xid": one.xid,
                "kind": one.kind.name,
                "attempts": one.attempts,
                "outcome": one.outcome,
            }
            for one in self._client.history
        ]

    async def run(self) -> None:
        """Work until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            nursery.start_soon(self._receive_arp)
            nursery.start_soon(self._run_timer)

    async def _receive(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._raw)
            for data in _read(self._raw):
                seen = frame.datagram(data, frame.CLIENT_PORT)
                if seen is not None:
                    self._perform(self._client.receive(seen.payload, seen.hardware, self._clock.now()))

    async def _receive_arp(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._arp)
            for data in _read(self._arp):
                seen = frame.arp(data)
                if seen is not None:
                    self._perform(self._client.heard(seen, self._clock.now()))

    async def _run_timer(self) -> None:
        while True:
            self._changed = trio.Event()
            deadline = self._client.deadline()
            wait = float("inf") if deadline is None else max(0.0, deadline - self._clock.now())
            with trio.move_on_after(wait):
                await self._changed.wait()
            self._perform(self._client.handle_timer(self._clock.now()))

    def _perform(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            match output:
                case Transmit(payload, source, destination, hardware):
                    data = frame.udp_frame(
                        self._hardware,
                        hardware,
                        source,
                        destination,
                        frame.CLIENT_PORT,
                        frame.SERVER_PORT,
                        payload,
                    )
                    self._send(self._raw, data)
                case SendArp():
                    self._send(self._arp, self._arp_frame(output))
                case _:
                    self._events(output)
        self._changed.set()  # also without output: an offer to be chosen has a deadline of its own
        self._watch()

    def _arp_frame(self, wanted: SendArp) -> bytes:
        own, address, asked = self._hardware, wanted.address, wanted.answer_to
        if asked is not None:
            return frame.arp_frame(own, address, asked.sender, to=asked.sender_hardware, reply=True)
        return frame.arp_frame(own, 0 if wanted.is_probe else address, address)

    def _watch(self) -> None:
        # Of all ARP on the link only what is about our address: there may be many clients and much ARP.
        address = self._client.watched_address()
        if address != self._watched:
            self._watched = address
            packet_socket.watch_arp(self._arp, address)

    def _send(self, sock: socket.socket, data: bytes) -> None:
        try:
            sock.send(data)
        except OSError:
            self.send_failures += 1  # as on a lossy wire: repeated after the usual time


def _read(sock: socket.socket) -> list[bytes]:
    found = []
    for _ in range(BATCH):
        try:
            found.append(sock.recv(65535))
        except OSError:  # nothing more, or the link is down and comes back
            break
    return found


async def run_client(
    link: str,
    config: ClientConfig,
    events: Callable[[Told], None],
    *,
    stored: Lease | None = None,
    task_status: trio.TaskStatus[DhcpClient] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hold a lease on `link` until cancelled; with nursery.start() the DhcpClient is the result.

    `events` is called in the trio thread with Acquired, Lost and Informed. `stored` is a lease from before,
    which is asked for again. Cancellation sends no RELEASE: call `release` first where that is wanted.
    Raises packet_socket.LinkGone when there is no such link, OSError without CAP_NET_RAW.
    """
    # Not for secrets: transaction numbers and jitter. The system's source, so that clones of a VM differ.
    chance = random.SystemRandom()
    core = Client(config, uniform=chance.uniform, random_xid=lambda: chance.getrandbits(32))
    with (
        packet_socket.open_udp(link, frame.CLIENT_PORT, is_for_any_host=True, client=config.hardware) as raw,
        packet_socket.open_arp(link, is_for_any_host=True) as arp,
    ):
        client = DhcpClient(core, Clock(), raw, arp, events)
        client.start(stored)
        task_status.started(client)
        await client.run()

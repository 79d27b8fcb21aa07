"""A guest whose address comes from somebody else's DHCP: our client asks there, our server answers here (trio).

The guest's port is in a bridge that has an uplink. Its requests are read at the port, before the bridge, and
answered at the port, behind it; `barrier` keeps the bridge from carrying them to the uplink, and the upstream
server's answers, which are for our client, to the guest. So each side sees one peer, and the lease is the same.

Invariant: a lease is stored before the guest is told of it, and a stored one is asked for again after a restart.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from rayos_net.dhcp import frame, packet_socket
from rayos_net.dhcp.answer import BROADCAST, Route
from rayos_net.dhcp.bucket import Buckets
from rayos_net.dhcp.client_action import Acquired, ClientConfig, Lost
from rayos_net.dhcp.client_service import DhcpClient, Told, run_client
from rayos_net.dhcp.clock import Clock
from rayos_net.dhcp.config import Limits
from rayos_net.dhcp.conflict import QUICK
from rayos_net.dhcp.handover import PARAMETERS, ClientOrder, Give, Handover, Step
from rayos_net.dhcp.lease import Lease
from rayos_net.dhcp.listener import Listener
from rayos_net.dhcp.message import MessageType
from rayos_net.dhcp.packet_socket import LinkGone

log = logging.getLogger(__name__)

TABLE: Final = "rayos_upstream"


@dataclass(frozen=True, slots=True)
class Given:
    """The guest was given this lease, or was refused one (`lease` None)."""

    lease: Lease | None
    kind: MessageType


Event = Acquired | Lost | Given


class Upstream:
    """One guest's two sides, as `run_upstream` hands them out. Call it from the trio thread."""

    def __init__(
        self, port: str, hardware: bytes, store: Path, events: Callable[[Event], None], limits: Limits
    ) -> None:
        self.port = port
        self.hardware = hardware
        self._core = Handover(hardware)
        self._store = store
        self._events = events
        self._clock = Clock()
        self._buckets = Buckets(limits.requests_per_second, limits.burst)
        self._client: DhcpClient
        self._raw: socket.socket
        self._own = b""
        self._listener = Listener(
            port,
            frame.SERVER_PORT,
            is_limited=True,
            is_port=True,
            take=self._take,
            after_batch=lambda: 0.0,
            discarded=partial(self._count, "drop_rate_limited"),
        )

    @property
    def client(self) -> DhcpClient:
        """The side towards the upstream server."""
        return self._client

    @property
    def counters(self) -> dict[str, int]:
        """Returns a copy of the guest's side's counters."""
        return dict(self._core.counters)

    def open(self, stack: ExitStack) -> None:
        """Open the guest's side. Raises LinkGone, OSError without CAP_NET_RAW."""
        self._listener.open(stack)
        self._raw = stack.enter_context(packet_socket.open_sender(self.port))
        self._own = packet_socket.hardware_address(self._raw)

    async def run(self, bridge: str, config: ClientConfig, started: Callable[[], None]) -> None:
        """Serve until cancelled. Raises LinkGone when the port is removed."""
        async with trio.open_nursery() as nursery:
            stored = load_lease(self._store)
            start = partial(run_client, bridge, config, self._told, stored=stored)
            self._client = await nursery.start(start)
            started()
            await self._listener.run()

    def _told(self, told: Told) -> None:
        match told:
            case Acquired(lease):
                save_lease(self._store, lease)
                self._events(told)
                self._perform(self._core.hold(lease, self._clock.now()))
            case Lost():
                save_lease(self._store, None)
                self._core.lose()
                self._events(told)

    def _take(self, data: bytes, port: str) -> float:
        now = self._clock.now()
        wait = self._buckets.take(port, now)
        if wait:
            self._count("drop_rate_limited")
            return wait
        seen = frame.datagram(data, frame.SERVER_PORT)
        if seen is not None:
            self._perform(self._core.receive(seen.payload, now))
        return 0.0

    def _perform(self, steps: Iterable[Step]) -> None:
        for step in steps:
            match step:
                case Give(reply, kind):
                    to_all = reply.route is Route.BROADCAST
                    data = frame.udp_frame(
                        self._own,
                        frame.BROADCAST_MAC if to_all else self.hardware,
                        self._core.server,
                        BROADCAST if to_all else reply.ip,
                        frame.SERVER_PORT,
                        frame.CLIENT_PORT,
                        reply.data,
                    )
                    # Told first: who guards the port must know the address before its guest uses it.
                    if kind is MessageType.ACK or kind is MessageType.NAK:
                        self._events(Given(self._core.lease if kind is MessageType.ACK else None, kind))
                    try:
                        self._raw.send(data)
                    except OSError:
                        self._count("send_failures")  # as on a lossy wire: the guest asks again
                case ClientOrder.START:
                    self._client.start()
                case ClientOrder.DECLINE:
                    self._client.decline()
                case ClientOrder.RELEASE:
                    self._client.release()

    def _count(self, what: str, by: int = 1) -> None:
        self._core.counters[what] = self._core.counters.get(what, 0) + by


async def run_upstream(
    port: str,
    bridge: str,
    hardware: bytes,
    events: Callable[[Event], None],
    *,
    store: Path,
    host_name: str = "",
    limits: Limits | None = None,
    task_status: trio.TaskStatus[Upstream] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Get a lease on `bridge` for the guest with the MAC `hardware` behind `port`, and hand it to the guest.

    Works until cancelled, or until the port is removed; with nursery.start() the Upstream is the result. `store`
    is the file of its lease; `events` is called in the trio thread. Put `barrier` in force first. Cancellation
    sends no RELEASE: the guest goes on. Raises LinkGone when there is no such port or bridge, OSError without
    CAP_NET_RAW.
    """
    config = ClientConfig(
        hardware, host_name=host_name, parameters=PARAMETERS, times=QUICK, retransmit=2.0, error_pause=10.0
    )
    upstream = Upstream(port, hardware, store, events, limits or Limits())
    is_started = False

    def started() -> None:
        nonlocal is_started
        is_started = True
        task_status.started(upstream)

    with ExitStack() as stack:
        upstream.open(stack)
        try:
            await upstream.run(bridge, config, started)
        except* LinkGone:
            if not is_started:
                raise
            log.debug("A port with an upstream address is gone", extra={"port": port})


def barrier(ports: Iterable[str]) -> str:
    """A script for nft: the bridge carries no DHCP request from these ports, and no DHCP answer to them.

    The rest of the table stays as it is; so do other ports that were named before.
    """
    names = ", ".join(f'"{port}"' for port in ports)
    add = f"add element bridge {TABLE} ports {{ {names} }}\n" if names else ""
    return f"""\
add table bridge {TABLE}
add set bridge {TABLE} ports {{ type ifname; }}
add chain bridge {TABLE} from_guests {{ type filter hook prerouting priority -300; policy accept; }}
add chain bridge {TABLE} to_guests {{ type filter hook postrouting priority 300; policy accept; }}
flush chain bridge {TABLE} from_guests
flush chain bridge {TABLE} to_guests
add rule bridge {TABLE} from_guests iifname @ports udp dport {frame.SERVER_PORT} counter drop
add rule bridge {TABLE} to_guests oifname @ports udp dport {frame.CLIENT_PORT} counter drop
{add}"""


def unbar(port: str) -> str:
    """A script for nft: `port` is an ordinary port again."""
    add = f'add element bridge {TABLE} ports {{ "{port}" }}\n'  # so that there is one to delete
    return barrier([]) + add + add.replace("add", "delete", 1)


def load_lease(path: Path) -> Lease | None:
    """The stored lease; None when there is none, or it can't be read."""
    try:
        return Lease.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("A stored lease is of no use", extra={"path": str(path), "error": str(error)})
        return None


def save_lease(path: Path, lease: Lease | None) -> None:
    """Store the lease as a whole or, on a full disk, not at all: then a restart asks for a new one."""
    try:
        if lease is None:
            path.unlink(missing_ok=True)
            return
        fresh = path.with_name(f"{path.name}.new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(lease.dumps())
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
    except OSError as error:
        log.warning("A lease could not be stored", extra={"path": str(path), "error": str(error.strerror)})

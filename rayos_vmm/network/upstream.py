"""Machines whose address comes from somebody else's DHCP: `net.address = "upstream"` on a bridge with an uplink.

Invariant: before a port is served, the bridge carries no DHCP between it and the uplink (`rayos_net.dhcp.upstream`);
when the port is gone, nothing of it is left but the stored lease, which the machine asks for when it starts again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import trio

from rayos_net import nft
from rayos_net.dhcp.client_action import Acquired, Lost
from rayos_net.dhcp.packet_socket import LinkGone
from rayos_net.dhcp.upstream import Event, Given, Upstream, barrier, load_lease, run_upstream, unbar
from rayos_net.nft import NftError
from rayos_vmm.errors import Busy, Conflict, one_error
from rayos_vmm.events import EventLog
from rayos_vmm.network.view import Lease, Transaction, UpstreamView

LOG: Final = logging.getLogger(__name__)
_OnLease = Callable[[str, str, bool], None]


@dataclass(slots=True)
class _Job:
    vm: str
    port: str
    bridge: str
    mac: str
    done: trio.Event = field(default_factory=trio.Event)  # it serves, or there is `trouble`
    trouble: str = ""
    upstream: Upstream | None = None


class Upstreams:
    """The machines with an upstream address; `serve` is the task in which they live."""

    def __init__(self, directory: Path, events: EventLog) -> None:
        self._directory = directory
        self._events = events
        self._jobs: dict[str, _Job] = {}  # by machine
        self._send, self._receive = trio.open_memory_channel[_Job](0)

    async def serve(
        self,
        on_lease: _OnLease,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Looks after the ports until cancelled; `on_lease(mac, address, is_bound)` before a guest hears of it."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        async with trio.open_nursery() as nursery:
            task_status.started()
            async for job in self._receive:
                nursery.start_soon(self._run, job, on_lease)

    async def follow(self, vm: str, *, port: str, bridge: str, mac: str) -> None:
        """From now on the machine's lease is acquired and handed on. Returns when its port is served.

        Raises:
            Busy: there is no such bridge, no privilege, no nft.
        """
        job = _Job(vm, port, bridge, mac)
        await self._send.send(job)
        await job.done.wait()
        if job.trouble:
            raise Busy(f"no upstream address for {vm}: {job.trouble}", code="no_network")

    def renew(self, vm: str) -> None:
        """Renews a machine's lease upstream now.

        Raises:
            Conflict: it has no upstream address.
        """
        found = self._jobs.get(vm)
        if found is None or found.upstream is None:
            raise Conflict(
                f"{vm} has no lease of ours to renew",
                hint='only a running machine with net.address = "upstream" has; other guests renew their own',
            )
        found.upstream.client.renew()

    def forget(self, mac: str) -> None:
        """The machine with this card is removed: so is its stored lease."""
        self._store(mac).unlink(missing_ok=True)

    def addresses_of(self, mac: str) -> list[str]:
        """The address of the card's stored lease, if that still runs."""
        lease = load_lease(self._store(mac))
        return [] if lease is None or lease.expires <= time.time() else [str(lease.address.ip)]

    def histories(self) -> dict[str, list[Transaction]]:
        """The last 16 transactions of each machine's client, the oldest first."""
        said = {vm: upstream.client.history() for vm, upstream in self._running()}
        return msgspec.convert(said, dict[str, list[Transaction]])

    def status(self) -> dict[str, UpstreamView]:
        """Each machine's client: its state, lease, and what the guest was answered."""
        found: dict[str, UpstreamView] = {}
        for vm, upstream in self._running():
            lease = upstream.client.lease
            found[vm] = UpstreamView(
                state=upstream.client.state.value,
                bridge=self._jobs[vm].bridge,
                address=None if lease is None else str(lease.address),
                server=None if lease is None else str(lease.server),
                guest=dict(sorted(upstream.counters.items())),
            )
        return found

    def leases(self) -> list[Lease]:
        """The leases as `HostNetwork.leases` lists its own."""
        found = []
        for vm, upstream in self._running():
            lease = upstream.client.lease
            if lease is not None:
                found.append(
                    Lease(
                        address=str(lease.address.ip),
                        mac=self._jobs[vm].mac,
                        state="upstream",
                        expires=lease.expires,
                        host_name=vm,
                        port=self._jobs[vm].port,
                    )
                )
        return found

    def _store(self, mac: str) -> Path:
        return self._directory / f"{mac.replace(':', '')}.json"

    def _running(self) -> list[tuple[str, Upstream]]:
        return [(vm, job.upstream) for vm, job in self._jobs.items() if job.upstream is not None]

    async def _run(self, job: _Job, on_lease: _OnLease) -> None:
        hardware = bytes.fromhex(job.mac.replace(":", ""))
        told = partial(self._told, job, on_lease)
        store = self._store(job.mac)
        try:
            await trio.to_thread.run_sync(nft.run, barrier([job.port]))
            with one_error():
                async with trio.open_nursery() as nursery:
                    job.upstream = await nursery.start(
                        partial(
                            run_upstream, job.port, job.bridge, hardware, told, store=store, host_name=job.vm
                        )
                    )
                    self._jobs[job.vm] = job
                    job.done.set()
            await trio.to_thread.run_sync(nft.run, unbar(job.port))
        except (NftError, LinkGone, OSError) as error:
            job.trouble = str(error.strerror) if isinstance(error, OSError) else str(error)
            LOG.warning("An upstream address has failed", extra={"vm": job.vm, "why": job.trouble})
            self._events.publish("upstream.failed", job.vm, reason=job.trouble)
        finally:
            if self._jobs.get(job.vm) is job:
                del self._jobs[job.vm]
            job.done.set()

    def _told(self, job: _Job, on_lease: _OnLease, event: Event) -> None:
        match event:
            case Acquired(lease):
                on_lease(job.mac, str(lease.address.ip), True)  # the guards know it before the guest does
                self._events.publish(
                    "upstream.acquired",
                    job.vm,
                    address=str(lease.address.ip),
                    server=str(lease.server),
                    expires=lease.expires,
                )
            case Lost(lease, reason):
                on_lease(job.mac, str(lease.address.ip), False)
                self._events.publish("upstream.lost", job.vm, address=str(lease.address.ip), reason=reason)
            case Given(None, _):
                self._events.publish("dhcp.refused", job.vm, mac=job.mac)
            case Given(lease, _) if lease is not None:
                on_lease(job.mac, str(lease.address.ip), True)
                self._events.publish("dhcp.bound", job.vm, address=str(lease.address.ip), mac=job.mac)

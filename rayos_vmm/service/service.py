"""The service: what a front end can ask for, by noun. The API layer translates HTTP to these calls and nothing else."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import (
    asynccontextmanager,
    contextmanager,
)
from importlib.metadata import version
from typing import Final

import trio

from rayos_vmm.config.settings import AuditConfig, ServiceConfig
from rayos_vmm.events import Event, EventLog
from rayos_vmm.guest.accounts import MachineAccounts
from rayos_vmm.hardware.protocols import Hardware
from rayos_vmm.machine.build import Dependencies
from rayos_vmm.network.local import follow_addresses
from rayos_vmm.paths import Paths
from rayos_vmm.service.connections import ConnectionCounts
from rayos_vmm.service.dhcp import Dhcp
from rayos_vmm.service.guests import Guests
from rayos_vmm.service.machines import Machines
from rayos_vmm.service.open import Parts, open_parts
from rayos_vmm.service.view import Info
from rayos_vmm.service.workers import Workers

#: Healthy guests are adopted in less, so that nobody who asks at once meets one half adopted.
ADOPTION_GRACE_S: Final = 2.0


class Service:
    """Use `open_service`. Every method may be called from any trio task of the same run."""

    def __init__(self, parts: Parts, config: ServiceConfig, nursery: trio.Nursery) -> None:
        self._parts = parts
        self._events = parts.events
        self._clients = 0
        self._activity = trio.Event()
        self._started = time.monotonic()
        self.registry = registry = parts.registry
        self.guests = Guests(registry, parts.authority)
        self.machines = Machines(
            registry,
            Dependencies(
                hardware=parts.hardware,
                platform=parts.platform,
                network=parts.network,
                tpms=parts.tpms,
                save=registry.save,
                start_timeout_s=config.start_timeout_s,
                overcommit=config.overcommit,
                takes_qemu_arguments=config.qemu_arguments,
            ),
            network=parts.network,
            leases=parts.leases,
            policy=parts.authority,
            firewall=parts.firewall,
            events=parts.events,
            nursery=nursery,
            guests=self.guests,
            notice=self._notice,
        )
        self.dhcp = Dhcp(parts.network, registry)
        self.workers = Workers(registry.all, registry.find, parts.events)
        self.accounts = MachineAccounts(registry.all, registry.find, registry.save, parts.authority.cap)
        self.policy = parts.authority
        self.revisions = parts.revisions
        self.firewall = parts.firewall
        self.gatekeeper = parts.gatekeeper
        self.event_counts = parts.events.counts
        self.connections = ConnectionCounts()

    async def info(self) -> Info:
        """The service, its QEMU, accelerator and network; may download QEMU the first time."""
        platform, network = await self._parts.platform.describe(), self._parts.network
        return Info(
            version=version("rayos-vmm"),
            qemu=platform.qemu,
            accelerator=platform.accelerator,
            subnet=None if network.trouble else str(network.subnet),
            bridge=None if network.trouble else network.bridge,
            network_trouble=network.trouble,
            uptime_s=round(time.monotonic() - self._started, 3),
            compiled=is_compiled(),
            runtime=str(self._parts.paths.runtime),
            state=str(self._parts.paths.state),
        )

    def events(self, since: int | None = None) -> AsyncGenerator[Event, None]:
        """From event `since`+1 on, then live and without end; None = from now. Close it with `aclosing`."""
        return self._events.follow(since)

    # Idle exit

    @contextmanager
    def client(self) -> Iterator[None]:
        """Held by the API around every request and stream, so that the daemon is not taken for idle."""
        self._clients += 1
        self._notice()
        try:
            yield
        finally:
            self._clients -= 1
            self._notice()

    async def wait_idle(self, seconds: float) -> None:
        """Returns once no machine has been running and no client there for `seconds` on end."""
        while True:
            activity = self._activity
            if self._clients or any(machine.is_live for machine in self.registry.all()):
                await activity.wait()
                continue
            with trio.move_on_after(seconds):
                await activity.wait()
                continue
            return

    def _notice(self) -> None:
        activity, self._activity = self._activity, trio.Event()
        activity.set()


def is_compiled() -> bool:
    """True when the device code runs as compiled extension modules."""
    import rayos_devices.virtio.vring as module

    return not str(module.__file__).endswith(".py")


@asynccontextmanager
async def open_service(
    config: ServiceConfig,
    paths: Paths,
    *,
    hardware: Hardware | None = None,
    events: EventLog | None = None,
    audit: AuditConfig | None = None,
) -> AsyncIterator[Service]:
    """The running service. Leaving it stops our part (DHCP, supervision) and leaves the guests running.

    Args:
        hardware: what machines get as devices; None for our own.

    Raises:
        Busy: another daemon owns the runtime directory.
        RayosError: the store or the network cannot be opened.
    """
    async with (
        open_parts(
            config, paths, hardware=hardware, events=events or EventLog(), audit=audit or AuditConfig()
        ) as parts,
        trio.open_nursery() as nursery,
    ):
        service = Service(parts, config, nursery)
        service.workers.switch(config.balance)
        nursery.start_soon(service.firewall.run)
        nursery.start_soon(follow_addresses, service.firewall.host_changed)
        nursery.start_soon(service.workers.run)
        await service.machines.load()
        nursery.start_soon(service.machines.adopt_networks)
        await service.machines.wait_adopted(ADOPTION_GRACE_S)
        yield service
        nursery.cancel_scope.cancel()

"""The parts of a running service, opened in order and closed in reverse."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from rayos_vmm.config.settings import AuditConfig, ServiceConfig
from rayos_vmm.errors import Busy, one_error
from rayos_vmm.events import EventLog
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.hardware.protocols import Hardware
from rayos_vmm.host.process import start_time
from rayos_vmm.machine.needs import Tpms
from rayos_vmm.network.bridge import HostNetwork, serve_network
from rayos_vmm.network.firewall import Firewall
from rayos_vmm.network.local import local_addresses
from rayos_vmm.network.taps import TapGuards
from rayos_vmm.paths import Paths
from rayos_vmm.policy.audit_log import Room
from rayos_vmm.policy.audit_witness import AuditWitness
from rayos_vmm.policy.authority import Authority, load_table, open_authority
from rayos_vmm.policy.enforcement import Enforcement, InheritedRules
from rayos_vmm.policy.gatekeeper import Gatekeeper, open_gatekeeper
from rayos_vmm.policy.revisions import Revisions, load_book
from rayos_vmm.qemu.platform import Platform
from rayos_vmm.service.dhcp import LeaseListener
from rayos_vmm.service.registry import Registry
from rayos_vmm.service.store import Store, open_store
from rayos_vmm.service.tpms import open_tpms

_LOCK_TIMEOUT_S: Final = 2.0
_LOCK_RETRY_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that the service is made of."""

    paths: Paths
    events: EventLog
    store: Store
    registry: Registry
    platform: Platform
    hardware: Hardware
    network: HostNetwork
    leases: LeaseListener
    tpms: Tpms
    authority: Authority
    revisions: Revisions
    firewall: Firewall
    gatekeeper: Gatekeeper


@asynccontextmanager
async def _only_daemon(lock: Path) -> AsyncIterator[None]:
    """Holds the lock of a directory; the kernel lets go of it when we die.

    The runtime directory has one and the state directory another: two services with one state would both own its
    machines, and write into one record.
    """
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # A service that was killed while it started a process holds on until that process has executed.
        deadline = trio.current_time() + _LOCK_TIMEOUT_S
        while not _try_lock(fd):
            pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            is_gone = pid.isdecimal() and start_time(int(pid)) is None
            if not is_gone or trio.current_time() > deadline:
                raise Busy(
                    f"another service (process {pid or 'unknown'}) runs on {lock.parent}",
                    hint="use that one, or set RAYOS_RUNTIME_DIR and RAYOS_STATE_DIR to others",
                )
            await trio.sleep(_LOCK_RETRY_S)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def open_parts(
    config: ServiceConfig,
    paths: Paths,
    *,
    hardware: Hardware | None,
    events: EventLog,
    audit: AuditConfig,
) -> AsyncIterator[Parts]:
    """The parts, ready to use.

    Raises:
        Busy: another daemon owns the runtime directory or the state directory.
        StoreError: the database cannot be opened.
        Invalid: the runtime directory's path is too long, or others may write in a directory.
    """
    paths.create()
    with one_error():
        async with (
            _only_daemon(paths.lock),
            _only_daemon(paths.state_lock),
            open_store(paths.database) as store,
            open_tpms(paths.state / "tpm-authority") as tpms,
        ):
            registry = Registry(store, paths, events)
            await registry.load()
            book, kept = await load_book(store)
            network = HostNetwork(config, paths.state, events)
            table = await load_table(store)
            firewall = Firewall(
                network,
                TapGuards(),
                local_addresses,
                inherited=InheritedRules(table, book),
                save=registry.save_firewall,
            )
            enforcement = Enforcement(book.revision, firewall)
            witness = AuditWitness(audit.witness) if audit.witness else None
            if witness is not None:
                witness.check(paths.audit)
            async with open_authority(
                store,
                paths.audit,
                events=events,
                table=table,
                book=book,
                devices=enforcement,
                key_path=paths.audit_key,
                room=Room(audit.segment_bytes, audit.kept),
                witness=witness,
            ) as authority:
                revisions = Revisions(store, authority, kept, enforcement, events)
                leases = LeaseListener(registry, firewall)
                gatekeeper = await open_gatekeeper(
                    store, paths.token_key, authority.audit, zone_of=book.zone_of, now=authority.now
                )
                hardware = hardware or WorkerHardware(authority, revisions.broadcaster, firewall)
                async with (
                    serve_network(network, leases),
                    hardware.running(),
                    trio.open_nursery() as nursery,
                ):
                    nursery.start_soon(revisions.broadcaster.run)
                    yield Parts(
                        paths=paths,
                        events=events,
                        store=store,
                        registry=registry,
                        platform=Platform(paths.cache, events),
                        hardware=hardware,
                        network=network,
                        leases=leases,
                        tpms=tpms,
                        authority=authority,
                        revisions=revisions,
                        firewall=firewall,
                        gatekeeper=gatekeeper,
                    )
                    nursery.cancel_scope.cancel()

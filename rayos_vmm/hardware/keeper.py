"""Our own devices as a machine's hardware: a keeper and its worker (`rayos_vmm/worker`) for each machine."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import trio

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Busy, GuestGone, Invalid
from rayos_vmm.hardware.client import KeeperClient, WorkerClient
from rayos_vmm.hardware.disk_reader import READER_GRACE_S, ViewFailed, open_raw_view
from rayos_vmm.hardware.launch import Keeper, KeeperFailed, Spawner, stop_keeper
from rayos_vmm.hardware.protocols import WORKER_LOG, DiskImage, Plugged, Worker
from rayos_vmm.host.identity import claim
from rayos_vmm.host.process import Process, ProcessId, start_time
from rayos_vmm.shared import accounts
from rayos_vmm.shared.devices import devices_of, rate_of
from rayos_vmm.shared.packet import Head, WorkerGone
from rayos_vmm.shared.spec import Device
from rayos_vmm.shared.spec import Firewall as WorkerFirewall

log = logging.getLogger(__name__)


def _devices(
    spec: VmSpec,
    disks: Sequence[DiskImage],
    disk_fds: Sequence[int],
    tap_fds: Sequence[int],
    *,
    has_console: bool,
) -> list[Device]:
    quota = spec.quota
    devices = [
        Device(
            kind="blk",
            name=f"disk{index}",
            fd=fd,
            read_only=disk.is_read_only,
            serial=disk.serial,
            queues=disk.queues,
            size_bytes=disk.size_bytes,
            block_bytes=disk.block_bytes,
            is_unsafe=disk.is_unsafe,
            front="vhost-user" if disk.bus == "virtio" else "nbd",
            quota_bytes=_storage_bytes(quota.disk_bytes, disks, disk),
            rate_bytes_per_second=quota.disk_rate_bytes_per_second,
            operations_per_second=quota.disk_operations,
        )
        for index, (disk, fd) in enumerate(zip(disks, disk_fds, strict=True))
    ]
    if tap_fds:
        rate = quota.net_rate_bits_per_second / 8
        devices.append(
            Device(
                kind="net",
                name="net",
                queue_fds=tuple(tap_fds),
                rate_bytes_per_second=rate,
                front="vhost-user" if spec.net.model == "virtio" else "stream",
                mtu=spec.net.mtu,
            )
        )
    if spec.gpu.is_ours:
        width, height = spec.gpu.width, spec.gpu.height
        devices.append(
            Device(
                kind="gpu",
                name="gpu",
                quota_bytes=quota.gpu_memory_bytes,
                width=width,
                height=height,
                # Its first mode stays on offer after a resize: a framebuffer of that size is kept by its driver.
                modes=((width, height), *spec.gpu.mode_sizes),
                scanouts=spec.gpu.scanouts,
            )
        )
    if spec.gpu.enabled:
        devices += [
            Device(kind="input", name=name, input_kind=name, queue_limit=quota.input_queue)
            for name in spec.input.devices
        ]
    devices.append(
        Device(kind="console", name="console", ports=("", *spec.console_ports[1:]), chardev=not has_console)
    )
    ready = {device.kind for device in devices} | {"net", "gpu", "input"}
    devices += [
        Device(kind=kind, name=name, rate_bytes_per_second=rate_of(spec, kind))
        for name, kind in devices_of(spec).items()
        if kind not in ready
    ]
    return [replace(device, packed=spec.packed and device.front == "vhost-user") for device in devices]


def _storage_bytes(quota_bytes: int, disks: Sequence[DiskImage], disk: DiskImage) -> int:
    """A disk's part of its machine's quota: a raw one is bounded by its size, the others share what that leaves.

    A raw image that is larger than the quota is one of the others.
    """
    if _is_bounded(disk, quota_bytes):
        return quota_bytes
    writable = [one for one in disks if not one.is_read_only]
    bounded = [one.path for one in writable if _is_bounded(one, quota_bytes)]
    rest = quota_bytes - sum(path.stat().st_size for path in bounded if path.is_file())
    return max(rest, 0) // max(1, len(writable) - len(bounded))


def _is_bounded(disk: DiskImage, quota_bytes: int) -> bool:
    return disk.format == "raw" and (not disk.path.is_file() or disk.path.stat().st_size <= quota_bytes)


def _judged(device: Device, firewall: WorkerFirewall) -> Device:
    return replace(device, firewall=firewall) if device.kind == "net" else device


def _open_disk(disk: DiskImage) -> int:
    try:
        return os.open(disk.path, (os.O_RDONLY if disk.is_read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise Busy(f"disk {disk.path} cannot be opened: {error.strerror}") from None


class Gates(Protocol):
    """Writes the gate pages: what each machine's devices may do (`policy.authority`)."""

    def open(self, vm: str, runtime: Path, *, is_new: bool) -> Path: ...
    def close(self, vm: str) -> None: ...


class Targets(Protocol):
    """Keeps the machines' workers at the newest revision of the policy (`policy.broadcast`)."""

    def attach(self, vm: str, runtime: Path) -> None: ...
    def detach(self, vm: str) -> None: ...


class Rules(Protocol):
    """Tells each machine's worker which frames may pass (`network.firewall`)."""

    async def plug(self, vm: str, runtime: Path) -> WorkerFirewall: ...
    async def attach(self, vm: str, runtime: Path, channel: WorkerClient) -> None: ...
    def detach(self, vm: str) -> None: ...
    async def unplug(self, vm: str) -> None: ...


class WorkerHardware:
    """The `Hardware` of the real service. Without `gates` every operation may happen, without `firewall` every frame
    passes."""

    def __init__(
        self, gates: Gates | None = None, targets: Targets | None = None, firewall: Rules | None = None
    ) -> None:
        self._spawner = Spawner()
        self._gates = gates
        self._targets = targets
        self._firewall = firewall

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """See `Hardware.running`."""
        async with self._spawner, trio.open_nursery() as nursery:
            nursery.start_soon(self._spawner.listen)
            yield
            nursery.cancel_scope.cancel()

    async def plug(
        self,
        spec: VmSpec,
        *,
        runtime: Path,
        logs: Path,
        disks: Sequence[DiskImage],
        tap_fds: Sequence[int],
        mac: str,
        has_console: bool,
        needs_vga: bool,
    ) -> Plugged:
        """See `Hardware.plug`.

        Raises:
            Busy: a disk image cannot be opened.
            Invalid: a disk image is not of its format.
            GuestGone: the keeper did not start.
        """
        fds = list(tap_fds)
        disk_fds: list[int] = []
        held: list[int] = []
        readers: list[Process] = []
        keeper: Keeper | None = None
        try:
            for index, disk in enumerate(disks):
                if disk.format == "raw":
                    disk_fds.append(_open_disk(disk))
                    continue
                shown = await open_raw_view(disk, runtime / f"disk{index}.raw", logs / WORKER_LOG)
                readers.append(shown.process)
                disk_fds.append(shown.fd)
                held.append(shown.life_fd)
            devices = _devices(spec, disks, disk_fds, tap_fds, has_console=has_console)
            if tap_fds and self._firewall is not None:
                firewall = await self._firewall.plug(spec.name, runtime)
                fds.append(firewall.page_fd)
                devices = [_judged(device, firewall) for device in devices]
            gate_fd = -1
            if self._gates is not None:
                page = self._gates.open(spec.name, runtime, is_new=True)
                gate_fd = os.open(page, os.O_RDONLY | os.O_CLOEXEC)
                fds.append(gate_fd)
            accounts_fd = accounts.create(runtime, len(devices))
            fds.append(accounts_fd)
            with claim() as identity:
                keeper = await self._spawner.start_keeper(
                    spec.name,
                    runtime,
                    devices,
                    logs / WORKER_LOG,
                    identity=identity,
                    memory_bytes=spec.memory_bytes,
                    gate_fd=gate_fd,
                    accounts_fd=accounts_fd,
                    held=held,
                )
        except KeeperFailed as error:
            raise GuestGone(f"the devices did not start: {error}") from None
        except ViewFailed as error:
            raise Invalid(str(error)) from None
        finally:
            for fd in fds + disk_fds + held:
                with suppress(OSError):  # a file of FUSE whose daemon has died says so once more
                    os.close(fd)
            for reader in readers:
                if keeper is None:
                    await reader.end(grace_s=READER_GRACE_S)
                reader.close()
        ports = len(spec.console_ports)
        return Plugged(
            slot=identity.slot,
            keeper=ProcessId(keeper.pid, start_time(keeper.pid) or 0),
            readers=tuple(reader.identity for reader in readers),
            sockets={device.name: keeper.socket(device.name) for device in devices if not device.chardev},
            console_ports=()
            if has_console
            else tuple(keeper.chardev_socket("console", port) for port in range(ports)),
            ports=ports,
        )

    @asynccontextmanager
    async def connect(self, runtime: Path) -> AsyncIterator[Worker | None]:
        """See `Hardware.connect`."""
        client = WorkerClient(runtime)
        if self._gates is not None:
            try:
                self._gates.open(runtime.name, runtime, is_new=False)
            except OSError as error:
                log.warning(
                    "a machine's devices are under no policy", extra={"vm": runtime.name, "why": str(error)}
                )
        if self._targets is not None:
            self._targets.attach(runtime.name, runtime)
        try:
            if self._firewall is not None:
                await self._firewall.attach(runtime.name, runtime, client)
            yield client
        finally:
            if self._targets is not None:
                self._targets.detach(runtime.name)
            if self._firewall is not None:
                self._firewall.detach(runtime.name)
            client.close()

    async def follow(self, runtime: Path, on_event: Callable[[Head], None]) -> None:
        """See `Hardware.follow`."""
        client = KeeperClient(runtime)
        try:
            await client.follow(on_event)
        except WorkerGone:
            return
        finally:
            client.close()

    async def watch(self, keeper: ProcessId) -> int | None:
        """See `Hardware.watch`."""
        return await self._spawner.watch(keeper)

    async def unplug(self, keeper: ProcessId, runtime: Path) -> None:
        """See `Hardware.unplug`."""
        if self._gates is not None:
            self._gates.close(runtime.name)
        if self._firewall is not None:
            await self._firewall.unplug(runtime.name)
        if start_time(keeper.pid) == keeper.start_time:
            await stop_keeper(Keeper(keeper.pid, runtime))

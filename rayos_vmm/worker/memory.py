"""The shared memory of a device that outlives its worker: crash-exact state, history, pixels, open flows, journals."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayos_devices.blk import nbd
from rayos_devices.console.backend import ConsoleBackend
from rayos_devices.gate import OPEN, Gate
from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.input.backend import InputBackend
from rayos_devices.net import stream
from rayos_devices.state import StateStore
from rayos_devices.virtio.packed import JOURNAL_BYTES
from rayos_net.firewall.memory import MEMORY_BYTES
from rayos_vmm.shared.spec import Device

DEFAULT_GPU_QUOTA_BYTES = 128 << 20
#: Of a network card: what its firewall was told.
FIREWALL_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Descriptors of memfds, -1 where the device keeps nothing of the kind."""

    state_fd: int = -1
    bulk_fd: int = -1
    state_bytes: int = 0
    #: Where its packed rings are, one for each queue (devices/rayos_devices/virtio/packed.py).
    journals: tuple[memoryview, ...] = ()

    @classmethod
    def create(cls, device: Device) -> DeviceMemory:
        held = cls._create(device)
        return replace(held, journals=_journals(device.queue_count)) if device.packed else held

    @classmethod
    def _create(cls, device: Device) -> DeviceMemory:
        match device.kind:
            case "console":
                bulk = ConsoleBackend.history_bytes(len(device.ports))
                return cls(
                    _memfd(device, "state"), _memfd(device, "history", bulk), ConsoleBackend.STATE_BYTES
                )
            case "input":
                return cls(_memfd(device, "state"), -1, InputBackend.STATE_BYTES)
            case "gpu":
                quota = device.quota_bytes or DEFAULT_GPU_QUOTA_BYTES
                return cls(_memfd(device, "state"), _memfd(device, "pixels", quota), GpuBackend.STATE_BYTES)
            case "net" if device.firewall is not None:
                return cls(_memfd(device, "state"), _memfd(device, "flows", MEMORY_BYTES), FIREWALL_BYTES)
            case _:
                return cls()

    @property
    def fds(self) -> list[int]:
        return [fd for fd in (self.state_fd, self.bulk_fd) if fd >= 0]

    def store(self) -> StateStore | None:
        return StateStore(self.state_fd, self.state_bytes) if self.state_fd >= 0 else None


def map_flows(fd: int) -> memoryview | None:
    """Maps a card's open flows; None when the keeper has no such memory."""
    return None if fd < 0 else memoryview(mmap.mmap(fd, MEMORY_BYTES))


def map_gate(fd: int) -> Gate:
    """The gate of all devices of a VM: the page behind the descriptor, which we may only read."""
    return OPEN if fd < 0 else Gate(memoryview(mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ)))


def shared_bytes(devices: Sequence[Device]) -> int:
    """Memory that the devices of one VM may keep for pictures, history, and rings of their own."""
    return sum(
        nbd.MEMORY_BYTES
        if device.front == "nbd"
        else stream.memory_bytes(device.mtu)
        if device.front == "stream"
        else device.quota_bytes or DEFAULT_GPU_QUOTA_BYTES
        if device.kind == "gpu"
        else ConsoleBackend.history_bytes(len(device.ports))
        if device.kind == "console"
        else 0
        for device in devices
    )


def _journals(queues: int) -> tuple[memoryview, ...]:
    """Of a keeper and all its forks."""
    pages = memoryview(mmap.mmap(-1, queues * JOURNAL_BYTES))
    return tuple(pages[at : at + JOURNAL_BYTES].cast("Q") for at in range(0, len(pages), JOURNAL_BYTES))


def _memfd(device: Device, what: str, size_bytes: int = 0) -> int:
    fd = os.memfd_create(f"rayos-{device.name}-{what}")
    if size_bytes:
        os.ftruncate(fd, size_bytes)
    return fd

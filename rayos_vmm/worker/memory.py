"""The shared memory of a device that outlives its worker: crash-exact state, history, pixels, open flows, journals."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

from rayos_devices.gate import OPEN, Gate
from rayos_devices.kinds import KINDS
from rayos_devices.state import StateStore
from rayos_devices.virtio.packed import JOURNAL_BYTES
from rayos_net.firewall.memory import MEMORY_BYTES
from rayos_vmm.shared.spec import Device

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
        kind = KINDS[device.kind]
        state_bytes, (what, bulk_bytes) = kind.state_bytes, kind.bulk(device)
        if device.firewall is not None:
            state_bytes, (what, bulk_bytes) = FIREWALL_BYTES, ("flows", MEMORY_BYTES)
        return cls(
            state_fd=_memfd(device, "state") if state_bytes else -1,
            bulk_fd=_memfd(device, what, bulk_bytes) if bulk_bytes else -1,
            state_bytes=state_bytes,
            journals=_journals(kind.queue_count(device)) if device.packed else (),
        )

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
    kinds = [(KINDS[device.kind], device) for device in devices]
    return sum(kind.bulk(device)[1] + kind.front_bytes(device) for kind, device in kinds)


def _journals(queues: int) -> tuple[memoryview, ...]:
    """Of a keeper and all its forks."""
    pages = memoryview(mmap.mmap(-1, queues * JOURNAL_BYTES))
    return tuple(pages[at : at + JOURNAL_BYTES].cast("Q") for at in range(0, len(pages), JOURNAL_BYTES))


def _memfd(device: Device, what: str, size_bytes: int = 0) -> int:
    fd = os.memfd_create(f"rayos-{device.name}-{what}")
    if size_bytes:
        os.ftruncate(fd, size_bytes)
    return fd

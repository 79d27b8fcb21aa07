"""A machine's disks: what they are, and giving one more room while the guest runs.

A disk only grows, since nobody knows what the guest has behind a new end. The image grows first; its device, and by it
QEMU and the guest, is told afterwards, again and again until it says that it has heard.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from rayos_vmm.config.host import raw_bytes
from rayos_vmm.config.spec import Disk
from rayos_vmm.config.units import format_size, parse_size
from rayos_vmm.errors import Invalid, NotFound
from rayos_vmm.machine.machine import Machine, worker_errors
from rayos_vmm.machine.view import DiskView

_SECTOR_BYTES: Final = 512


def _find(machine: Machine, index: int) -> tuple[Disk, Path]:
    disks = machine.record.spec.disks
    if not 0 <= index < len(disks):
        raise NotFound(f"{machine.name} has no disk {index}: it has {len(disks)}", code="no_such_device")
    return disks[index], machine.disk_path(index)


def view(machine: Machine, index: int) -> DiskView:
    """One disk, as its image is now. Blocking (it looks at a file).

    Raises:
        NotFound: there is no such disk, or its image is gone.
    """
    disk, path = _find(machine, index)
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            allocated_bytes = os.fstat(file.fileno()).st_blocks * 512
    except FileNotFoundError:
        size_bytes, allocated_bytes = parse_size(disk.size) if disk.size else 0, 0
    spec = machine.record.spec
    return DiskView(
        index=index,
        path=str(path),
        size_bytes=size_bytes,
        allocated_bytes=allocated_bytes,
        quota_bytes=spec.quota.disk_bytes,
        is_read_only=disk.read_only,
        format=disk.format,
        queues=spec.disk_queues(disk),
        bus=disk.bus,
    )


async def resize(machine: Machine, index: int, size_bytes: int) -> None:
    """Makes a disk larger; a running guest is told. Asking again for the same size tells it again.

    Raises:
        NotFound: there is no such disk.
        Invalid: smaller than it is, beyond the quota, read-only, or no file that can grow.
    """
    disk, path = _find(machine, index)
    now_bytes = view(machine, index).size_bytes
    quota_bytes = whole = machine.record.spec.quota.disk_bytes
    quota_bytes -= sum(
        raw_bytes(one, whole) for at, one in enumerate(machine.record.spec.disks) if at != index
    )
    if disk.format != "raw":
        raise Invalid(
            f"{machine.name}: disk {index} is {disk.format}: stop the machine and use qemu-img resize"
        )
    if disk.read_only:
        raise Invalid(f"{machine.name}: disk {index} is read-only")
    if disk.bus != "virtio" and machine.is_live:
        raise Invalid(
            f"{machine.name}: disk {index} has bus = {disk.bus!r}, whose controller reads a size once: "
            "stop the machine first"
        )
    if size_bytes % _SECTOR_BYTES or not now_bytes <= size_bytes <= quota_bytes:
        raise Invalid(
            f"{machine.name}: disk {index} cannot have {size_bytes} bytes: multiples of {_SECTOR_BYTES} "
            f"from {format_size(now_bytes)} (it only grows) to {format_size(quota_bytes)} (quota.disk, which all its "
            "disks share) are allowed"
        )
    if path.is_file():
        if size_bytes > now_bytes:
            os.truncate(path, size_bytes)
    elif path.exists() and size_bytes != now_bytes:
        raise Invalid(f"{path} is no file: make it {size_bytes} bytes large yourself, then ask again")
    if disk.size is not None:
        disks = list(machine.record.spec.disks)
        disks[index] = msgspec.structs.replace(disk, size=format_size(size_bytes))
        machine.record.spec = msgspec.structs.replace(machine.record.spec, disks=disks)
    if machine.is_live:
        worker = machine.need_worker()
        with worker_errors(machine):
            await worker.resize_disk(f"disk{index}")
    machine.events.publish("disk.resized", machine.name, disk=index, size_bytes=size_bytes)

"""Operations on a machine's disks."""

from __future__ import annotations

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.config.units import parse_size
from rayos_vmm.contract import operations
from rayos_vmm.machine.view import DiskView


@serves(operations.DISK_LIST)
async def _list(call: Call) -> list[DiskView]:
    return await call.service.guests.disks(call.name)


@serves(operations.DISK_RESIZE)
async def _resize(call: Call) -> DiskView:
    return await call.service.guests.resize_disk(call.name, call.body.disk, parse_size(call.body.size))

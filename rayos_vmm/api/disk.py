"""Operations on a machine's disks."""

from __future__ import annotations

from typing import Final

from rayos_vmm.api.endpoint import Call, Endpoint
from rayos_vmm.config.units import parse_size
from rayos_vmm.contract.types import DiskSize
from rayos_vmm.machine.view import DiskView


async def _list(call: Call) -> list[DiskView]:
    return await call.service.disks(call.name)


async def _resize(call: Call) -> DiskView:
    return await call.service.resize_disk(call.name, call.body.disk, parse_size(call.body.size))


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/vms/{name}/disks", _list, "The disks", answers=list[DiskView]),
    Endpoint(
        "PUT",
        "/v1/vms/{name}/disks/size",
        _resize,
        "Make a disk larger, also under a running guest",
        body=DiskSize,
        answers=DiskView,
    ),
)

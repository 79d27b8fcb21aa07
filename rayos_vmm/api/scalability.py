"""Operations on the device workers as a whole: how busy each is, where; moving them between processors."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from rayos_vmm.api.endpoint import Call, Endpoint


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The processor to move a machine's worker to."""

    core: Annotated[int, Meta(ge=0, le=4095)]


async def _load(call: Call) -> dict[str, Any]:
    return await call.service.worker_load()


async def _rebalance(call: Call) -> dict[str, Any]:
    return await call.service.rebalance()


async def _move(call: Call) -> dict[str, Any]:
    return await call.service.move_worker(call.name, call.body.core)


ENDPOINTS: Final = (
    Endpoint(
        "GET",
        "/v1/scalability/load",
        _load,
        "How busy each device worker and each processor is; takes a second",
        answers=dict[str, Any],
    ),
    Endpoint(
        "POST",
        "/v1/scalability/rebalance",
        _rebalance,
        "Measure, and move workers to idler processors where it is worth it",
        answers=dict[str, Any],
    ),
    Endpoint(
        "POST",
        "/v1/vms/{name}/worker",
        _move,
        "Hand the devices over to a new worker on another processor, under the running guest",
        body=Place,
        answers=dict[str, Any],
    ),
)

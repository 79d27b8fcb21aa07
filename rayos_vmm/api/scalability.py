"""Operations on the device workers as a whole: how busy each is, where; moving them between processors."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from rayos_vmm.api.endpoint import Call, Endpoint


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The processor to move a machine's worker to."""

    core: Annotated[int, Meta(ge=0, le=4095)]


class Switch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether workers are moved without being asked, until the service ends (`service.balance` says how it begins)."""

    on: bool


async def _status(call: Call) -> dict[str, Any]:
    return {**call.service.revisions.scalability(), "balance": call.service.workers.status()}


async def _load(call: Call) -> dict[str, Any]:
    return await call.service.workers.load()


async def _rebalance(call: Call) -> dict[str, Any]:
    return await call.service.workers.rebalance()


async def _switch(call: Call) -> dict[str, Any]:
    return call.service.workers.switch(call.body.on)


async def _move(call: Call) -> dict[str, Any]:
    return await call.service.workers.move(call.name, call.body.core)


ENDPOINTS: Final = (
    Endpoint(
        "GET",
        "/v1/scalability",
        _status,
        "How far the newest revision has come: in all, by machine, by zone; how evenly the workers are spread",
        answers=dict[str, Any],
    ),
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
        "PUT",
        "/v1/scalability/auto",
        _switch,
        "Move workers without being asked while their load is uneven, or not",
        body=Switch,
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

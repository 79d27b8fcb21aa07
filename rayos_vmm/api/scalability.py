"""Operations on the device workers as a whole: how busy each is, where; moving them between processors."""

from __future__ import annotations

from typing import Any

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.contract import operations


@serves(operations.SCALABILITY_STATUS)
async def _status(call: Call) -> dict[str, Any]:
    return {**call.service.revisions.scalability(), "balance": call.service.workers.status()}


@serves(operations.SCALABILITY_LOAD)
async def _load(call: Call) -> dict[str, Any]:
    return await call.service.workers.load()


@serves(operations.SCALABILITY_REBALANCE)
async def _rebalance(call: Call) -> dict[str, Any]:
    return await call.service.workers.rebalance()


@serves(operations.SCALABILITY_SWITCH)
async def _switch(call: Call) -> dict[str, Any]:
    return call.service.workers.switch(call.body.on)


@serves(operations.SCALABILITY_MOVE)
async def _move(call: Call) -> dict[str, Any]:
    return await call.service.workers.move(call.name, call.body.core)

"""Operations on the device workers as a whole: how busy each is, where; moving them between processors."""

from __future__ import annotations

import msgspec

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import Scalability
from rayos_vmm.service.balance import BalanceStatus, LoadView, Moved, Rebalanced


@serves(operations.SCALABILITY_STATUS)
async def _status(call: Call) -> Scalability:
    spread = msgspec.structs.asdict(call.service.revisions.scalability())
    return Scalability(**spread, balance=call.service.workers.status())


@serves(operations.SCALABILITY_LOAD)
async def _load(call: Call) -> LoadView:
    return await call.service.workers.load()


@serves(operations.SCALABILITY_REBALANCE)
async def _rebalance(call: Call) -> Rebalanced:
    return await call.service.workers.rebalance()


@serves(operations.SCALABILITY_SWITCH)
async def _switch(call: Call) -> BalanceStatus:
    return call.service.workers.switch(call.body.on)


@serves(operations.SCALABILITY_MOVE)
async def _move(call: Call) -> Moved:
    return await call.service.workers.move(call.name, call.body.core)

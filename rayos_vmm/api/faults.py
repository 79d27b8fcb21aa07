"""Operations on what goes wrong in a machine's devices on purpose."""

from __future__ import annotations

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.contract import operations
from rayos_vmm.shared.view import FaultState


@serves(operations.FAULTS_GET)
async def _get(call: Call) -> dict[str, list[FaultState]]:
    return await call.service.guests.faults(call.name)


@serves(operations.FAULTS_SET)
async def _set(call: Call) -> dict[str, list[FaultState]]:
    await call.service.guests.set_faults(call.name, call.body.device, call.body.rules, call.body.seed)
    return await call.service.guests.faults(call.name)

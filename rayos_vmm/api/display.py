"""Operations on a machine's display: pictures, what changed, modes."""

from __future__ import annotations

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.contract import operations
from rayos_vmm.machine.view import Damage
from rayos_vmm.shared.view import DisplayInfo


@serves(operations.DISPLAY_INFO)
async def _info(call: Call) -> DisplayInfo:
    return await call.service.guests.display(call.name).info()


@serves(operations.DISPLAY_DAMAGE)
async def _damage(call: Call) -> Damage:
    query = call.query
    return await call.service.guests.display(call.name).wait_damage(
        query.since, query.scanout, query.timeout_s
    )


@serves(operations.DISPLAY_RESIZE)
async def _resize(call: Call) -> None:
    body = call.body
    await call.service.guests.display(call.name).resize(body.width, body.height, body.scanout)


@serves(operations.DISPLAY_SCREENSHOT)
async def _screenshot(call: Call) -> bytes:
    return await call.service.guests.display(call.name).screenshot(
        call.query.scanout, with_cursor=call.query.cursor
    )

"""Operations on the policy document: show, change, compare, go back; and on the zones in it."""

from __future__ import annotations

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import History, Zones
from rayos_vmm.policy.view import Changes, Shown


@serves(operations.HIERARCHY_SHOW)
async def _show(call: Call) -> Shown:
    return call.service.revisions.show()


@serves(operations.HIERARCHY_APPLY)
async def _apply(call: Call) -> Changes:
    ask = call.body
    return await call.service.revisions.apply(ask.document, ask.reason, ask.base)


@serves(operations.HIERARCHY_DIFF)
async def _diff(call: Call) -> Changes:
    return Changes(changes=call.service.revisions.diff(call.body.document))


@serves(operations.HIERARCHY_HISTORY)
async def _history(call: Call) -> History:
    return History(revisions=call.service.revisions.history())


@serves(operations.HIERARCHY_ROLLBACK)
async def _rollback(call: Call) -> Changes:
    return await call.service.revisions.rollback(call.body.revision)


@serves(operations.HIERARCHY_ZONES)
async def _zones(call: Call) -> Zones:
    return Zones(zones=call.service.revisions.zones())


@serves(operations.HIERARCHY_CREATE_ZONE)
async def _create_zone(call: Call) -> Changes:
    return await call.service.revisions.create_zone(call.body.zone)


@serves(operations.HIERARCHY_REMOVE_ZONE)
async def _remove_zone(call: Call) -> Changes:
    return await call.service.revisions.remove_zone(call.name)


@serves(operations.HIERARCHY_ASSIGN)
async def _assign(call: Call) -> Changes:
    return await call.service.revisions.assign(call.name, call.body.zone, call.body.parent)

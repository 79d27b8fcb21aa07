"""Operations on machines as wholes: define, start, stop, wait, remove."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import msgspec
import trio

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.api.stream import Stream
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import VmList
from rayos_vmm.contract.operation import NDJSON
from rayos_vmm.machine.view import VmView
from rayos_vmm.service.view import Info
from rayos_vmm.shared.packet import Stats


@serves(operations.MACHINES_INFO)
async def _info(call: Call) -> Info:
    return await call.service.info()


@serves(operations.MACHINES_LIST)
async def _list(call: Call) -> VmList:
    return VmList(vms=await call.service.machines.list())


@serves(operations.MACHINES_CREATE)
async def _create(call: Call) -> VmView:
    view = await call.service.machines.define(call.body.spec)
    return await call.service.machines.start(view.spec.name) if call.body.start else view


@serves(operations.MACHINES_GET)
async def _get(call: Call) -> VmView:
    return await call.service.machines.get(call.name)


@serves(operations.MACHINES_REMOVE)
async def _remove(call: Call) -> None:
    await call.service.machines.remove(call.name)


@serves(operations.MACHINES_STOP)
async def _stop(call: Call) -> VmView:
    return await call.service.machines.stop(call.name, call.body.timeout_s)


@serves(operations.MACHINES_WAIT)
async def _wait(call: Call) -> VmView:
    return await call.service.machines.wait(call.name, call.query.for_, call.query.timeout_s)


@serves(operations.MACHINES_HOLD)
async def _hold(call: Call) -> Stream:
    holding = call.service.machines.hold(call.name)
    views = await holding.__aenter__()  # so that an unknown name is an error and no empty answer

    async def lines() -> AsyncGenerator[bytes, None]:
        try:
            async for view in views:
                yield msgspec.json.encode(view) + b"\n"
        finally:
            with trio.CancelScope(shield=True):
                await holding.__aexit__(None, None, None)

    return Stream(lines(), media_type=NDJSON)


@serves(operations.MACHINES_RELEASE)
async def _release(call: Call) -> None:
    await call.service.machines.release(call.name)


@serves(operations.MACHINES_STATS)
async def _stats(call: Call) -> Stats:
    return await call.service.guests.stats(call.name)


@serves(operations.MACHINES_START)
async def _start(call: Call) -> VmView:
    return await call.service.machines.start(call.name)


@serves(operations.MACHINES_KILL)
async def _kill(call: Call) -> VmView:
    return await call.service.machines.kill(call.name)


@serves(operations.MACHINES_PAUSE)
async def _pause(call: Call) -> VmView:
    return await call.service.machines.pause(call.name)


@serves(operations.MACHINES_RESUME)
async def _resume(call: Call) -> VmView:
    return await call.service.machines.resume(call.name)


@serves(operations.MACHINES_RESET)
async def _reset(call: Call) -> VmView:
    return await call.service.machines.reset(call.name)

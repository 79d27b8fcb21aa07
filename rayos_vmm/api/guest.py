"""Operations inside one guest: its commands, files, and QEMU's own monitor."""

from __future__ import annotations

from rayos_vmm.api.body import FILE_MAXIMUM_BYTES, read_limited
from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import QmpReturn
from rayos_vmm.machine.view import ExecResult


@serves(operations.GUEST_SIZE)
async def _size(call: Call) -> None:
    await call.service.guests.console_resize(call.name, call.body.port, call.body.columns, call.body.rows)


@serves(operations.GUEST_EXEC)
async def _exec(call: Call) -> ExecResult:
    return await call.service.guests.exec(call.name, call.body.command, call.body.timeout_s)


@serves(operations.GUEST_READ)
async def _read(call: Call) -> bytes:
    return await call.service.guests.read_file(call.name, call.query.path)


@serves(operations.GUEST_WRITE)
async def _write(call: Call) -> None:
    data = await read_limited(call.request, FILE_MAXIMUM_BYTES)
    await call.service.guests.write_file(call.name, call.query.path, data, call.query.mode)


@serves(operations.GUEST_QMP)
async def _qmp(call: Call) -> QmpReturn:
    return QmpReturn(return_=await call.service.guests.qmp(call.name, call.body.command, call.body.arguments))


@serves(operations.GUEST_TRANSCRIPT)
async def _transcript(call: Call) -> bytes:
    return (await call.service.guests.qmp_transcript(call.name)).encode()

"""Operations inside one guest: its commands, files, and QEMU's own monitor."""

from __future__ import annotations

from typing import Final

from rayos_vmm.api.body import FILE_MAXIMUM_BYTES, read_limited
from rayos_vmm.api.endpoint import BYTES, Call, Endpoint
from rayos_vmm.contract.types import ConsoleSize, Exec, FileQuery, PutQuery, Qmp, QmpReturn
from rayos_vmm.machine.view import ExecResult


async def _size(call: Call) -> None:
    await call.service.console_resize(call.name, call.body.port, call.body.columns, call.body.rows)


async def _exec(call: Call) -> ExecResult:
    return await call.service.exec(call.name, call.body.command, call.body.timeout_s)


async def _read(call: Call) -> bytes:
    return await call.service.read_file(call.name, call.query.path)


async def _write(call: Call) -> None:
    data = await read_limited(call.request, FILE_MAXIMUM_BYTES)
    await call.service.write_file(call.name, call.query.path, data, call.query.mode)


async def _qmp(call: Call) -> QmpReturn:
    return QmpReturn(return_=await call.service.qmp(call.name, call.body.command, call.body.arguments))


async def _transcript(call: Call) -> bytes:
    return (await call.service.qmp_transcript(call.name)).encode()


_VM: Final = "/v1/vms/{name}"
LINES: Final = "application/jsonl"
ENDPOINTS: Final = (
    Endpoint("POST", f"{_VM}/console/size", _size, "Resize a console", body=ConsoleSize),
    Endpoint(
        "POST",
        f"{_VM}/exec",
        _exec,
        "Run a command by the agent",
        body=Exec,
        answers=ExecResult,
        is_long=True,
    ),
    Endpoint("GET", f"{_VM}/files", _read, "Read a file", query=FileQuery, media=BYTES, is_long=True),
    Endpoint("PUT", f"{_VM}/files", _write, "Write a file", query=PutQuery, body_media=BYTES),
    Endpoint("GET", f"{_VM}/qmp", _transcript, "What was said over QMP, a line of JSON each", media=LINES),
    Endpoint("POST", f"{_VM}/qmp", _qmp, "A QMP command", body=Qmp, answers=QmpReturn, is_long=True),
)

"""Operations on machines as wholes: define, start, stop, wait, remove."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from rayos_vmm.api.endpoint import Call, Endpoint
from rayos_vmm.contract.types import Create, Stop, VmList, WaitQuery
from rayos_vmm.machine.view import VmView


async def _info(call: Call) -> dict[str, Any]:
    return await call.service.info()


async def _list(call: Call) -> VmList:
    return VmList(vms=await call.service.list())


async def _create(call: Call) -> VmView:
    view = await call.service.define(call.body.spec)
    return await call.service.start(view.spec.name) if call.body.start else view


async def _get(call: Call) -> VmView:
    return await call.service.get(call.name)


async def _remove(call: Call) -> None:
    await call.service.remove(call.name)


async def _stop(call: Call) -> VmView:
    return await call.service.stop(call.name, call.body.timeout_s)


async def _wait(call: Call) -> VmView:
    return await call.service.wait(call.name, call.query.for_, call.query.timeout_s)


async def _stats(call: Call) -> dict[str, Any]:
    return await call.service.stats(call.name)


def _verb(verb: str, summary: str) -> Endpoint:
    async def handler(call: Call) -> VmView:
        method: Callable[[str], Awaitable[VmView]] = getattr(call.service, verb)
        return await method(call.name)

    handler.__name__ = f"_{verb}"
    return Endpoint("POST", f"/v1/vms/{{name}}/{verb}", handler, summary, answers=VmView)


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/info", _info, "The daemon, its QEMU and its accelerator", answers=dict[str, Any]),
    Endpoint("GET", "/v1/vms", _list, "All machines", answers=VmList),
    Endpoint(
        "POST",
        "/v1/vms",
        _create,
        "Define a machine, and start it if asked",
        body=Create,
        answers=VmView,
        status=201,
    ),
    Endpoint("GET", "/v1/vms/{name}", _get, "One machine", answers=VmView),
    Endpoint(
        "DELETE", "/v1/vms/{name}", _remove, "Remove a machine that does not run, with its disks and TPM"
    ),
    _verb("start", "Start; answers once the machine runs"),
    Endpoint(
        "POST",
        "/v1/vms/{name}/stop",
        _stop,
        "Ask the guest to power down; after the time limit QEMU is told to quit",
        body=Stop,
        body_is_optional=True,
        answers=VmView,
    ),
    _verb("kill", "End QEMU at once"),
    _verb("pause", "Stop the guest's processors"),
    _verb("resume", "Let the guest's processors go on"),
    _verb("reset", "Press the reset button"),
    Endpoint(
        "GET",
        "/v1/vms/{name}/wait",
        _wait,
        "Wait until the machine is ready, running or stopped",
        query=WaitQuery,
        answers=VmView,
        is_long=True,
    ),
    Endpoint("GET", "/v1/vms/{name}/stats", _stats, "Counters of the devices", answers=dict[str, Any]),
)

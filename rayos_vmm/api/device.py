"""Operations on devices' accounts, their limits and the level of optimization; and all of it for Prometheus."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import Devices, Machines
from rayos_vmm.contract.asks import AskLevel, Limits
from rayos_vmm.guest.view import DeviceDetail, Metrics
from rayos_vmm.service.metrics import CONTENT_TYPE, render


def _device(call: Call) -> str:
    device: str = call.path["device"]
    return device


@serves(operations.DEVICE_OVERVIEW)
async def _overview(call: Call) -> Machines:
    return Machines(machines=call.service.accounts.overview())


@serves(operations.DEVICE_LIST)
async def _list(call: Call) -> Devices:
    return Devices(devices=call.service.accounts.devices(call.name))


@serves(operations.DEVICE_SHOW)
async def _show(call: Call) -> DeviceDetail:
    return call.service.accounts.device(call.name, _device(call), call.query.last)


@serves(operations.DEVICE_LIMITS)
async def _limits(call: Call) -> Limits:
    return Limits(**call.service.accounts.limits(call.name, _device(call)))


@serves(operations.DEVICE_SET_LIMITS)
async def _set_limits(call: Call) -> Limits:
    wanted: dict[str, int] = msgspec.to_builtins(call.body)
    return Limits(**await call.service.accounts.set_limits(call.name, _device(call), wanted))


@serves(operations.DEVICE_METRICS)
async def _metrics(call: Call) -> Metrics:
    return call.service.accounts.metrics(call.name, call.query.last)


@serves(operations.DEVICE_SET_LEVEL)
async def _set_level(call: Call) -> AskLevel:
    return AskLevel(level=await call.service.accounts.set_level(call.name, call.body.level))


@serves(operations.DEVICE_PROMETHEUS)
async def _prometheus(call: Call) -> Response:
    return Response(await render(call.service), media_type=CONTENT_TYPE)

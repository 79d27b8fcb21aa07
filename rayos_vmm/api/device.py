"""Operations on devices' accounts, their limits and the level of optimization; and all of it for Prometheus."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from rayos_devices.account import OPERATIONS
from rayos_devices.levels import Level
from rayos_devices.limits import MAXIMUM
from rayos_devices.metrics import SAMPLES
from rayos_vmm.api.endpoint import Call, Endpoint
from rayos_vmm.service.metrics import CONTENT_TYPE, render

_Limit = Annotated[int, Meta(ge=0, le=MAXIMUM)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Limits of a device, those that it has; 0 is unbounded. `rate` and `storage` and `memory` are in bytes."""

    rate: _Limit | UnsetType = UNSET
    iops: _Limit | UnsetType = UNSET
    storage: _Limit | UnsetType = UNSET
    memory: _Limit | UnsetType = UNSET
    queue: _Limit | UnsetType = UNSET


class AskLevel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much a machine's devices do to be fast."""

    level: Annotated[int, Meta(ge=0, le=int(max(Level)))]


class DeviceQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many of the last operations that were kept."""

    last: Annotated[int, Meta(ge=0, le=OPERATIONS)] = 0


class MetricsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many of the last samples."""

    last: Annotated[int, Meta(ge=1, le=SAMPLES)] = SAMPLES


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """Devices with their counters, latencies, denials, queue depth and limits."""

    devices: list[dict[str, Any]]


class Machines(msgspec.Struct, frozen=True, kw_only=True):
    """Running machines, each with its level, its last two samples and its devices."""

    machines: list[dict[str, Any]]


def _device(call: Call) -> str:
    device: str = call.request.path_params["device"]
    return device


async def _overview(call: Call) -> Machines:
    return Machines(machines=call.service.accounting.overview())


async def _list(call: Call) -> Devices:
    return Devices(devices=call.service.accounting.devices(call.name))


async def _show(call: Call) -> dict[str, Any]:
    return call.service.accounting.device(call.name, _device(call), call.query.last)


async def _limits(call: Call) -> Limits:
    return Limits(**call.service.accounting.limits(call.name, _device(call)))


async def _set_limits(call: Call) -> Limits:
    wanted: dict[str, int] = msgspec.to_builtins(call.body)
    return Limits(**await call.service.accounting.set_limits(call.name, _device(call), wanted))


async def _metrics(call: Call) -> dict[str, Any]:
    return call.service.accounting.metrics(call.name, call.query.last)


async def _set_level(call: Call) -> AskLevel:
    return AskLevel(level=await call.service.accounting.set_level(call.name, call.body.level))


async def _prometheus(call: Call) -> Response:
    return Response(await render(call.service), media_type=CONTENT_TYPE)


ENDPOINTS: Final = (
    Endpoint("GET", "/metrics", _prometheus, "All that is counted, for Prometheus", media=CONTENT_TYPE),
    Endpoint(
        "GET", "/v1/devices", _overview, "The devices of all machines, and their load", answers=Machines
    ),
    Endpoint("GET", "/v1/vms/{name}/devices", _list, "What a machine's devices did", answers=Devices),
    Endpoint(
        "GET",
        "/v1/vms/{name}/devices/{device}",
        _show,
        "One device: also where its time goes, and its last operations",
        query=DeviceQuery,
        answers=dict[str, Any],
    ),
    Endpoint("GET", "/v1/vms/{name}/devices/{device}/limits", _limits, "A device's limits", answers=Limits),
    Endpoint(
        "PUT",
        "/v1/vms/{name}/devices/{device}/limits",
        _set_limits,
        "Change limits; the running device obeys them when this answers",
        body=Limits,
        answers=Limits,
    ),
    Endpoint(
        "GET",
        "/v1/vms/{name}/metrics",
        _metrics,
        "The last samples of what a machine's devices did, one a second",
        query=MetricsQuery,
        answers=dict[str, Any],
    ),
    Endpoint(
        "PUT",
        "/v1/vms/{name}/level",
        _set_level,
        "Switch a machine's devices to a level of optimization",
        body=AskLevel,
        answers=AskLevel,
    ),
)

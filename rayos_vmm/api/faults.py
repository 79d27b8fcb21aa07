"""Operations on what goes wrong in a machine's devices on purpose."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from rayos_devices.faults import MAX_RULES
from rayos_vmm.api.endpoint import Call, Endpoint
from rayos_vmm.config.fault import FaultRule


class SetFaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The faults of one device from now on, in the order in which they are tried; none: nothing goes wrong."""

    device: Annotated[str, Meta(max_length=64, examples=["disk0"])]
    rules: Annotated[list[FaultRule], Meta(max_length=MAX_RULES)] = []
    seed: int = 0


async def _get(call: Call) -> dict[str, list[dict[str, Any]]]:
    return await call.service.faults(call.name)


async def _set(call: Call) -> dict[str, list[dict[str, Any]]]:
    await call.service.set_faults(call.name, call.body.device, call.body.rules, call.body.seed)
    return await call.service.faults(call.name)


_ANSWER: Final = dict[str, list[dict[str, Any]]]
ENDPOINTS: Final = (
    Endpoint(
        "GET",
        "/v1/vms/{name}/faults",
        _get,
        "What goes wrong on purpose, and how often it did",
        answers=_ANSWER,
    ),
    Endpoint(
        "PUT",
        "/v1/vms/{name}/faults",
        _set,
        "Have things go wrong in a device",
        body=SetFaults,
        answers=_ANSWER,
    ),
)

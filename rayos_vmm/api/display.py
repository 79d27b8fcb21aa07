"""Operations on a machine's display: pictures, what changed, modes."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from rayos_vmm.api.endpoint import PNG, Call, Endpoint
from rayos_vmm.config.spec import Side
from rayos_vmm.contract.types import Seconds
from rayos_vmm.machine.view import Damage

Scanout = Annotated[int, Meta(ge=0, le=15, description="monitor; 0 is the first")]


class ScreenshotQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which monitor, and whether the guest's cursor is drawn into the picture."""

    scanout: Scanout = 0
    cursor: bool = False


class Resize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The mode that a monitor is to prefer."""

    width: Side
    height: Side
    scanout: Scanout = 0


class DamageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """After which serial (0: since ever), and how long to wait."""

    since: Annotated[int, Meta(ge=0)] = 0
    scanout: Scanout = 0
    timeout_s: Seconds = 60.0


async def _info(call: Call) -> dict[str, Any]:
    return await call.service.display(call.name).info()


async def _damage(call: Call) -> Damage:
    query = call.query
    return await call.service.display(call.name).wait_damage(query.since, query.scanout, query.timeout_s)


async def _resize(call: Call) -> None:
    body = call.body
    await call.service.display(call.name).resize(body.width, body.height, body.scanout)


async def _screenshot(call: Call) -> bytes:
    return await call.service.display(call.name).screenshot(call.query.scanout, with_cursor=call.query.cursor)


_VM: Final = "/v1/vms/{name}"
ENDPOINTS: Final = (
    Endpoint(
        "GET",
        f"{_VM}/screenshot",
        _screenshot,
        "What a monitor shows",
        query=ScreenshotQuery,
        media=PNG,
    ),
    Endpoint("GET", f"{_VM}/display", _info, "The monitors and their modes", answers=dict[str, Any]),
    Endpoint(
        "POST",
        f"{_VM}/display/resize",
        _resize,
        "Give a monitor another mode, and tell the guest",
        body=Resize,
    ),
    Endpoint(
        "GET",
        f"{_VM}/display/damage",
        _damage,
        "Wait until a picture changes; answers what of it did",
        query=DamageQuery,
        answers=Damage,
        is_long=True,
    ),
)

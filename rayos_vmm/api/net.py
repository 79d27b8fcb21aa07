"""Operations on a machine's network card: what it is, its cable, what passes through it."""

from __future__ import annotations

from typing import Final

from rayos_vmm.api.endpoint import Call, Endpoint
from rayos_vmm.api.types import Link
from rayos_vmm.vm.view import NetView


async def _view(call: Call) -> NetView:
    return await call.service.net(call.name)


async def _link(call: Call) -> NetView:
    return await call.service.set_link(call.name, call.body.up)


async def _announce(call: Call) -> None:
    await call.service.announce(call.name)


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/vms/{name}/net", _view, "The network card", answers=NetView),
    Endpoint(
        "PUT", "/v1/vms/{name}/net/link", _link, "Pull the cable or plug it in", body=Link, answers=NetView
    ),
    Endpoint("POST", "/v1/vms/{name}/net/announce", _announce, "Have the guest announce its addresses"),
)

"""Operations on a machine's network card: what it is, its cable, what passes through it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from starlette.responses import StreamingResponse

from rayos_vmm.api.endpoint import BYTES, Call, Endpoint
from rayos_vmm.contract.types import CaptureQuery, Link
from rayos_vmm.machine.view import NetView


async def _view(call: Call) -> NetView:
    return await call.service.net(call.name)


async def _link(call: Call) -> NetView:
    return await call.service.set_link(call.name, call.body.up)


async def _announce(call: Call) -> None:
    await call.service.announce(call.name)


async def _capture(call: Call) -> StreamingResponse:
    pieces = call.service.capture(call.name, call.query.snap, call.query.count)
    head = await anext(pieces)  # what cannot begin is refused before the answer does

    async def body() -> AsyncGenerator[bytes, None]:
        async with aclosing(pieces):
            yield head
            async for piece in pieces:
                yield piece

    return StreamingResponse(body(), media_type=BYTES)


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/vms/{name}/net", _view, "The network card", answers=NetView),
    Endpoint(
        "PUT", "/v1/vms/{name}/net/link", _link, "Pull the cable or plug it in", body=Link, answers=NetView
    ),
    Endpoint("POST", "/v1/vms/{name}/net/announce", _announce, "Have the guest announce its addresses"),
    Endpoint(
        "GET",
        "/v1/vms/{name}/net/capture",
        _capture,
        "What passes the network card, live, as pcapng",
        query=CaptureQuery,
        media=BYTES,
    ),
)

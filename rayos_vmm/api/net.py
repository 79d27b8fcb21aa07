"""Operations on a machine's network card: what it is, its cable, what passes through it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.api.stream import Stream
from rayos_vmm.contract import operations
from rayos_vmm.contract.operation import BYTES
from rayos_vmm.machine.view import NetView


@serves(operations.NET_VIEW)
async def _view(call: Call) -> NetView:
    return await call.service.guests.net(call.name)


@serves(operations.NET_LINK)
async def _link(call: Call) -> NetView:
    return await call.service.guests.set_link(call.name, call.body.up)


@serves(operations.NET_ANNOUNCE)
async def _announce(call: Call) -> None:
    await call.service.guests.announce(call.name)


@serves(operations.NET_CAPTURE)
async def _capture(call: Call) -> Stream:
    pieces = call.service.guests.capture(call.name, call.query.snap, call.query.count)
    head = await anext(pieces)  # what cannot begin is refused before the answer does

    async def body() -> AsyncGenerator[bytes, None]:
        async with aclosing(pieces):
            yield head
            async for piece in pieces:
                yield piece

    return Stream(body(), media_type=BYTES)

"""Events as they happen: one JSON object a line, with sequence numbers to resume from."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import msgspec
from starlette.responses import StreamingResponse

from rayos_vmm.api.endpoint import NDJSON, Call, Endpoint
from rayos_vmm.contract.types import EventsQuery


async def _events(call: Call) -> StreamingResponse:
    events = call.service.events(call.query.since)

    async def lines() -> AsyncGenerator[bytes, None]:
        async with aclosing(events):
            async for event in events:
                yield msgspec.json.encode(event) + b"\n"

    return StreamingResponse(lines(), media_type=NDJSON)


ENDPOINTS: Final = (
    Endpoint(
        "GET",
        "/v1/events",
        _events,
        "Events, one JSON object a line, without end",
        query=EventsQuery,
        media=NDJSON,
    ),
)

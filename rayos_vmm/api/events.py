"""Events as they happen: one JSON object a line, with sequence numbers to resume from."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.api.stream import Stream
from rayos_vmm.contract import operations
from rayos_vmm.contract.operation import NDJSON


@serves(operations.EVENTS_EVENTS)
async def _events(call: Call) -> Stream:
    events = call.service.events(call.query.since)

    async def lines() -> AsyncGenerator[bytes, None]:
        async with aclosing(events):
            async for event in events:
                yield msgspec.json.encode(event) + b"\n"

    return Stream(lines(), media_type=NDJSON)

"""Operations on a machine's keyboard, mouse, tablet and touch screen."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import msgspec

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.api.stream import Stream
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import InputDevices, InputTaken
from rayos_vmm.contract.operation import NDJSON
from rayos_vmm.machine.recording import FORMAT


@serves(operations.INPUT_DEVICES)
async def _devices(call: Call) -> InputDevices:
    return InputDevices(devices=await call.service.guests.input(call.name).devices())


@serves(operations.INPUT_TYPE)
async def _type(call: Call) -> InputTaken:
    to = await call.service.guests.input(call.name).type_text(call.body.text, call.body.layout)
    return InputTaken(to=to)


@serves(operations.INPUT_KEY)
async def _key(call: Call) -> InputTaken:
    return InputTaken(to=await call.service.guests.input(call.name).press(call.body.combo))


@serves(operations.INPUT_POINTER)
async def _pointer(call: Call) -> None:
    await call.service.guests.input(call.name).point(call.body.x, call.body.y, call.body.buttons)


@serves(operations.INPUT_MOUSE)
async def _mouse(call: Call) -> None:
    body = call.body
    await call.service.guests.input(call.name).move(body.dx, body.dy, body.wheel, body.buttons)


@serves(operations.INPUT_TOUCH)
async def _touch(call: Call) -> None:
    await call.service.guests.input(call.name).touch(call.body.points)


@serves(operations.INPUT_EVENTS)
async def _events(call: Call) -> None:
    await call.service.guests.input(call.name).send(call.body.device, call.body.events)


@serves(operations.INPUT_RECORD)
async def _record(call: Call) -> Stream:
    machine = call.service.guests.input(call.name)
    machine.check_recordable()

    async def lines() -> AsyncGenerator[bytes, None]:
        with machine.record() as recording:
            yield msgspec.json.encode({**FORMAT, "vm": call.name}) + b"\n"  # from here on nothing is missed
            async for step in recording:
                yield msgspec.json.encode(step) + b"\n"

    return Stream(lines(), media_type=NDJSON)


@serves(operations.INPUT_REPLAY)
async def _replay(call: Call) -> None:
    await call.service.guests.input(call.name).replay(call.body.steps, call.body.speed)

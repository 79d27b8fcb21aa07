"""Operations on a machine's keyboard, mouse, tablet and touch screen."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta
from starlette.responses import StreamingResponse

from rayos_vmm.api.endpoint import NDJSON, Call, Endpoint
from rayos_vmm.config.spec import Layout
from rayos_vmm.guest.input import FINGERS
from rayos_vmm.machine.recording import EVENTS_MAXIMUM, FORMAT, STEPS_MAXIMUM, Step

_Share = Annotated[float, Meta(ge=0, le=1)]
_Steps = Annotated[int, Meta(ge=-32768, le=32767)]
_Buttons = Annotated[list[Literal["left", "right", "middle"]], Meta(max_length=3)]


class Type(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text to type on the guest's keyboard; `layout` is the one that the guest has (absent: the machine's)."""

    text: Annotated[str, Meta(max_length=65536)]
    layout: Layout | None = None


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keys to press together, such as `ctrl-alt-delete`."""

    combo: Annotated[str, Meta(min_length=1, max_length=200, examples=["ctrl-alt-delete"])]


class Pointer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the tablet points, as a share of the display, and the buttons held; none releases all."""

    x: _Share
    y: _Share
    buttons: _Buttons = []


class Mouse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the mouse moves and its wheel turns, and the buttons held; none releases all."""

    dx: _Steps = 0
    dy: _Steps = 0
    wheel: _Steps = 0
    buttons: _Buttons = []


class Touch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where fingers are on the touch screen, as shares of the display; none lifts all."""

    points: Annotated[list[tuple[_Share, _Share]], Meta(max_length=FINGERS)] = []


class Events(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """evdev events (type, code, value) for one device; a missing SYN_REPORT at the end is added."""

    device: Annotated[str, Meta(max_length=32)]
    events: Annotated[list[tuple[int, int, int]], Meta(min_length=1, max_length=EVENTS_MAXIMUM)]


class Replay(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recording to do again, so many times as fast."""

    steps: Annotated[list[Step], Meta(max_length=STEPS_MAXIMUM)]
    speed: Annotated[float, Meta(ge=0.01, le=1000)] = 1.0


class InputDevices(msgspec.Struct, frozen=True, kw_only=True):
    """The input devices: lights, what is held down, what waits for the guest, what was dropped."""

    devices: list[dict[str, Any]]


async def _devices(call: Call) -> InputDevices:
    return InputDevices(devices=await call.service.input(call.name).devices())


async def _type(call: Call) -> None:
    await call.service.input(call.name).type_text(call.body.text, call.body.layout)


async def _key(call: Call) -> None:
    await call.service.input(call.name).press(call.body.combo)


async def _pointer(call: Call) -> None:
    await call.service.input(call.name).point(call.body.x, call.body.y, call.body.buttons)


async def _mouse(call: Call) -> None:
    body = call.body
    await call.service.input(call.name).move(body.dx, body.dy, body.wheel, body.buttons)


async def _touch(call: Call) -> None:
    await call.service.input(call.name).touch(call.body.points)


async def _events(call: Call) -> None:
    await call.service.input(call.name).send(call.body.device, call.body.events)


async def _record(call: Call) -> StreamingResponse:
    machine = call.service.input(call.name)
    machine.check_recordable()

    async def lines() -> AsyncGenerator[bytes, None]:
        with machine.record() as recording:
            yield msgspec.json.encode({**FORMAT, "vm": call.name}) + b"\n"  # from here on nothing is missed
            async for step in recording:
                yield msgspec.json.encode(step) + b"\n"

    return StreamingResponse(lines(), media_type=NDJSON)


async def _replay(call: Call) -> None:
    await call.service.input(call.name).replay(call.body.steps, call.body.speed)


_VM: Final = "/v1/vms/{name}"
ENDPOINTS: Final = (
    Endpoint("GET", f"{_VM}/input", _devices, "The input devices as they are now", answers=InputDevices),
    Endpoint("POST", f"{_VM}/type", _type, "Type text on the keyboard", body=Type, is_long=True),
    Endpoint("POST", f"{_VM}/key", _key, "Press keys together", body=Key),
    Endpoint("POST", f"{_VM}/pointer", _pointer, "Move the tablet's pointer, hold buttons", body=Pointer),
    Endpoint("POST", f"{_VM}/mouse", _mouse, "Move the mouse, turn its wheel, hold buttons", body=Mouse),
    Endpoint("POST", f"{_VM}/touch", _touch, "Put fingers on the touch screen", body=Touch),
    Endpoint("POST", f"{_VM}/input", _events, "Hand evdev events to a device", body=Events, is_long=True),
    Endpoint(
        "GET",
        f"{_VM}/input/record",
        _record,
        "What reaches the input devices: a line that says so, then one step as JSON a line until the machine ends",
        media=NDJSON,
    ),
    Endpoint(
        "POST",
        f"{_VM}/input/replay",
        _replay,
        "Do a recording again; a client that leaves ends it, and what is held is released",
        body=Replay,
        is_long=True,
    ),
)

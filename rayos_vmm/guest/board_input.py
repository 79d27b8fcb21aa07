"""Evdev events for the keyboards and mice that QEMU emulates: PS/2 ones, or what hangs on USB.

QEMU hands them to the device that the guest uses (QEMU's QMP reference, input-send-event). Its PS/2 keyboard holds 16
bytes and has no way to say that it is full, so keys follow each other as a fast typist's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import trio

from rayos_vmm.errors import Invalid
from rayos_vmm.qemu.qmp import Qmp

#: Between one key event and the next: a key is two to eight bytes of PS/2's scan codes.
KEY_PAUSE_S: Final = 0.02
_EV_KEY, _EV_REL, _EV_ABS = 1, 2, 3
_AXES: Final = {0: "x", 1: "y"}
_REL_WHEEL: Final = 8
_BUTTONS: Final = {0x110: "left", 0x111: "right", 0x112: "middle", 0x113: "side", 0x114: "extra"}
_FIRST_BUTTON: Final = 0x100
#: Evdev's codes are the PC's scan codes up to here; of the others, the scan codes of an extended keyboard
#: (0x80 stands for the prefix E0).
_SAME_UP_TO: Final = 88
_NUMBERS: Final = {
    89: 0x73,
    90: 0x78,
    91: 0x77,
    92: 0x79,
    93: 0x70,
    94: 0x7B,
    95: 0x5C,
    96: 0x9C,
    97: 0x9D,
    98: 0xB5,
    99: 0x54,
    100: 0xB8,
    102: 0xC7,
    103: 0xC8,
    104: 0xC9,
    105: 0xCB,
    106: 0xCD,
    107: 0xCF,
    108: 0xD0,
    109: 0xD1,
    110: 0xD2,
    111: 0xD3,
    113: 0xA0,
    114: 0xAE,
    115: 0xB0,
    116: 0xDE,
    117: 0x59,
    119: 0xC6,
    121: 0x7E,
    122: 0x72,
    123: 0x71,
    124: 0x7D,
    125: 0xDB,
    126: 0xDC,
    127: 0xDD,
}


def to_qmp(events: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """The events as QMP's InputEvents.

    Raises:
        Invalid: no emulated device has that key, button or axis.
    """
    return [one for event in events for one in _convert(*event)]


def _convert(kind: int, code: int, value: int) -> list[dict[str, Any]]:
    if kind == _EV_KEY and code >= _FIRST_BUTTON:
        if code in _BUTTONS:
            return [_event("btn", down=bool(value), button=_BUTTONS[code])]
    elif kind == _EV_KEY:
        number = code if code <= _SAME_UP_TO else _NUMBERS.get(code)
        if number is not None:
            key = {"type": "number", "data": number}
            return [_event("key", down=bool(value), key=key)]
    elif kind == _EV_REL and code == _REL_WHEEL:
        button = "wheel-up" if value > 0 else "wheel-down"
        return abs(value) * [_event("btn", down=down, button=button) for down in (True, False)]
    elif kind in (_EV_REL, _EV_ABS) and code in _AXES:
        return [_event("rel" if kind == _EV_REL else "abs", axis=_AXES[code], value=value)]
    elif kind == 0:
        return []
    raise Invalid(f"event {kind}, {code}: a keyboard or mouse of a PC has no such key, button or axis")


def _event(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": data}


async def send(qmp: Qmp, events: Sequence[tuple[int, int, int]]) -> None:
    """Hands the events to the device that the guest uses; a key at a time, whatever else at once.

    Raises:
        Invalid: as `to_qmp`; nothing was sent.
    """
    waiting: list[dict[str, Any]] = []
    for one in to_qmp(events):
        if one["type"] != "key":
            waiting.append(one)
            continue
        if waiting:
            await qmp.execute("input-send-event", {"events": waiting})
            waiting = []
        await qmp.execute("input-send-event", {"events": [one]})
        await trio.sleep(KEY_PAUSE_S)
    if waiting:
        await qmp.execute("input-send-event", {"events": waiting})

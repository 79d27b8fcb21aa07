"""Evdev events as QEMU's own devices take them."""

from __future__ import annotations

import pytest

from rayos_devices.input.codes import Key
from rayos_vmm.errors import Invalid
from rayos_vmm.guest.board_input import to_qmp


def test_keys_buttons_and_axes_have_qemus_words() -> None:
    """A key by its scan code, E0 as bit 7; the wheel is a button that is pressed and let go."""
    assert to_qmp([(1, 30, 1), (1, 105, 0), (0, 0, 0)]) == [
        {"type": "key", "data": {"down": True, "key": {"type": "number", "data": 30}}},
        {"type": "key", "data": {"down": False, "key": {"type": "number", "data": 0xCB}}},
    ]
    assert to_qmp([(1, 0x111, 1), (2, 1, -3), (3, 0, 9)]) == [
        {"type": "btn", "data": {"down": True, "button": "right"}},
        {"type": "rel", "data": {"axis": "y", "value": -3}},
        {"type": "abs", "data": {"axis": "x", "value": 9}},
    ]
    assert [one["data"]["button"] for one in to_qmp([(2, 8, -2)])] == 4 * ["wheel-down"]


def test_a_pc_keyboard_has_what_people_press() -> None:
    """All but a few keys of ours, and no two of them have one scan code."""
    known = {}
    for key in Key:
        try:
            (event,) = to_qmp([(1, key, 1)])
        except Invalid:
            continue
        known[key] = event["data"]["key"]["data"]
    assert len(set(known.values())) == len(known) and len(known) >= 110
    with pytest.raises(Invalid, match="no such key"):
        to_qmp([(1, 248, 1)])

"""Text and combinations become the keys that a person would press."""

from __future__ import annotations

import string

import pytest

from rayos_devices.input.codes import Key
from rayos_devices.input.keymap import LAYOUTS, combo_to_events, text_to_events
from rayos_devices.input.model import KINDS, Event
from rayos_devices.input.wire import EventType

SYN = (0, 0, 0)


def stroke(*keys: int) -> list[Event]:
    down = [event for key in keys for event in ((EventType.KEY, key, 1), SYN)]
    return down + [event for key in reversed(keys) for event in ((EventType.KEY, key, 0), SYN)]


def test_plain_text() -> None:
    assert text_to_events("a\n") == stroke(Key.KEY_A) + stroke(Key.KEY_ENTER)
    assert text_to_events("") == []


def test_shift_is_held_over_what_needs_it() -> None:
    down, up = [(1, Key.KEY_LEFTSHIFT, 1), SYN], [(1, Key.KEY_LEFTSHIFT, 0), SYN]
    assert text_to_events("AB.") == [
        *down,
        *stroke(Key.KEY_A),
        *stroke(Key.KEY_B),
        *up,
        *stroke(Key.KEY_DOT),
    ]
    assert text_to_events("?") == [*down, *stroke(Key.KEY_SLASH), *up]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_ascii(layout: str) -> None:
    """Every printable ASCII character, every event one that our keyboard can make, and nothing stays down."""
    events = text_to_events(string.printable.replace("\x0b", "").replace("\x0c", ""), layout)
    down: set[int] = set()
    for event in events:
        KINDS["keyboard"].check(event)
        if event[0] == EventType.KEY:
            (down.add if event[2] else down.remove)(event[1])
    assert not down


@pytest.mark.parametrize(
    ("character", "keys"),
    [
        ("z", [(Key.KEY_Y,)]),
        ("ß", [(Key.KEY_MINUS,)]),
        ("Ä", [(Key.KEY_LEFTSHIFT, Key.KEY_APOSTROPHE)]),
        ("@", [(Key.KEY_RIGHTALT, Key.KEY_Q)]),
        ("|", [(Key.KEY_RIGHTALT, Key.KEY_102ND)]),
        ("\\", [(Key.KEY_RIGHTALT, Key.KEY_MINUS)]),
        ("~", [(Key.KEY_RIGHTALT, Key.KEY_RIGHTBRACE)]),
        ("€", [(Key.KEY_RIGHTALT, Key.KEY_E)]),
        ("µ", [(Key.KEY_RIGHTALT, Key.KEY_M)]),
        ("{", [(Key.KEY_RIGHTALT, Key.KEY_7)]),
        ("^", [(Key.KEY_GRAVE,), (Key.KEY_SPACE,)]),
        ("é", [(Key.KEY_EQUAL,), (Key.KEY_E,)]),
        ("`", [(Key.KEY_LEFTSHIFT, Key.KEY_EQUAL), (Key.KEY_SPACE,)]),
    ],
)
def test_german_keys(character: str, keys: list[tuple[int, ...]]) -> None:
    assert text_to_events(character, "de") == [event for combo in keys for event in stroke(*combo)]


@pytest.mark.parametrize(
    ("character", "keys"),
    [
        ("a", [(Key.KEY_Q,)]),
        ("q", [(Key.KEY_A,)]),
        ("m", [(Key.KEY_SEMICOLON,)]),
        ("1", [(Key.KEY_LEFTSHIFT, Key.KEY_1)]),
        ("é", [(Key.KEY_2,)]),
        ("-", [(Key.KEY_6,)]),
        (".", [(Key.KEY_LEFTSHIFT, Key.KEY_COMMA)]),
        ("/", [(Key.KEY_LEFTSHIFT, Key.KEY_DOT)]),
        ("@", [(Key.KEY_RIGHTALT, Key.KEY_0)]),
        ("\\", [(Key.KEY_RIGHTALT, Key.KEY_8)]),
        ("^", [(Key.KEY_RIGHTALT, Key.KEY_9)]),
        ("~", [(Key.KEY_RIGHTALT, Key.KEY_2)]),
        ("€", [(Key.KEY_RIGHTALT, Key.KEY_E)]),
        ("ê", [(Key.KEY_LEFTBRACE,), (Key.KEY_E,)]),
        ("ï", [(Key.KEY_LEFTSHIFT, Key.KEY_LEFTBRACE), (Key.KEY_I,)]),
        ("ù", [(Key.KEY_APOSTROPHE,)]),
        ("µ", [(Key.KEY_LEFTSHIFT, Key.KEY_BACKSLASH)]),
    ],
)
def test_french_keys(character: str, keys: list[tuple[int, ...]]) -> None:
    assert text_to_events(character, "fr") == [event for combo in keys for event in stroke(*combo)]


@pytest.mark.parametrize(
    ("combo", "keys"),
    [
        ("ctrl-alt-delete", (Key.KEY_LEFTCTRL, Key.KEY_LEFTALT, Key.KEY_DELETE)),
        ("Ctrl+C", (Key.KEY_LEFTCTRL, Key.KEY_C)),
        ("enter", (Key.KEY_ENTER,)),
        ("KEY_F12", (Key.KEY_F12,)),
        ("alt-f4", (Key.KEY_LEFTALT, Key.KEY_F4)),
        ("ctrl--", (Key.KEY_LEFTCTRL, Key.KEY_MINUS)),
        ("-", (Key.KEY_MINUS,)),
        ("shift-1", (Key.KEY_LEFTSHIFT, Key.KEY_1)),
        ("kpenter", (Key.KEY_KPENTER,)),
    ],
)
def test_combinations(combo: str, keys: tuple[int, ...]) -> None:
    assert combo_to_events(combo) == stroke(*keys)


def test_what_is_unknown_is_named_with_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"'é' at position 1 .* layout 'us'; it has .*abc.*"):
        text_to_events("hé")
    with pytest.raises(ValueError, match="layout 'xx': known are de, fr, us"):
        text_to_events("x", "xx")
    with pytest.raises(ValueError, match=r"no key is called 'crtl': .*ctrl.*delete"):
        combo_to_events("crtl-alt-delete")
    with pytest.raises(ValueError, match="'control' is twice"):
        combo_to_events("ctrl-control")
    with pytest.raises(ValueError, match="no key is called ''"):
        combo_to_events("")

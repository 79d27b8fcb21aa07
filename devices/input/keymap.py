"""Text and key names as the evdev events of somebody who types them on a US keyboard.

Every press and every release is a report of its own (closed by SYN_REPORT), as from a real keyboard, and all
keys are up again at the end. Codes: linux/input-event-codes.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from devices.input.codes import Key

Event = tuple[int, int, int]

_EV_SYN, _EV_KEY = 0, 1
_SYN: Final[Event] = (_EV_SYN, 0, 0)

_PLAIN: Final = {
    "`": Key.KEY_GRAVE,
    "-": Key.KEY_MINUS,
    "=": Key.KEY_EQUAL,
    "[": Key.KEY_LEFTBRACE,
    "]": Key.KEY_RIGHTBRACE,
    "\\": Key.KEY_BACKSLASH,
    ";": Key.KEY_SEMICOLON,
    "'": Key.KEY_APOSTROPHE,
    ",": Key.KEY_COMMA,
    ".": Key.KEY_DOT,
    "/": Key.KEY_SLASH,
    " ": Key.KEY_SPACE,
    "\n": Key.KEY_ENTER,
    "\r": Key.KEY_ENTER,
    "\t": Key.KEY_TAB,
    "\b": Key.KEY_BACKSPACE,
    "\x1b": Key.KEY_ESC,
    **{letter: Key[f"KEY_{letter.upper()}"] for letter in "abcdefghijklmnopqrstuvwxyz0123456789"},
}
# Each character behind the key that gives it with shift.
_SHIFTED: Final = dict(zip('~!@#$%^&*()_+{}|:"<>?', "`1234567890-=[]\\;',./", strict=True))

_ALIASES: Final = {
    "ctrl": Key.KEY_LEFTCTRL,
    "control": Key.KEY_LEFTCTRL,
    "alt": Key.KEY_LEFTALT,
    "altgr": Key.KEY_RIGHTALT,
    "shift": Key.KEY_LEFTSHIFT,
    "meta": Key.KEY_LEFTMETA,
    "super": Key.KEY_LEFTMETA,
    "win": Key.KEY_LEFTMETA,
    "return": Key.KEY_ENTER,
    "escape": Key.KEY_ESC,
    "del": Key.KEY_DELETE,
    "ins": Key.KEY_INSERT,
    "pgup": Key.KEY_PAGEUP,
    "pgdn": Key.KEY_PAGEDOWN,
    "print": Key.KEY_SYSRQ,
}
LAYOUTS: Final = ("us",)


def _key_events(keys: Sequence[Key]) -> list[Event]:
    """Presses in order, releases in reverse."""
    events: list[Event] = []
    for key in keys:
        events += [(_EV_KEY, key, 1), _SYN]
    for key in reversed(keys):
        events += [(_EV_KEY, key, 0), _SYN]
    return events


def text_to_events(text: str, layout: str = "us") -> list[Event]:
    """The (type, code, value) events that type `text`.

    Raises:
        ValueError: a character has no key in this layout, or there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"keyboard layout {layout!r}; allowed are {', '.join(LAYOUTS)}")
    events: list[Event] = []
    for position, character in enumerate(text):
        if character in _PLAIN:
            events += _key_events([_PLAIN[character]])
            continue
        base = _SHIFTED.get(character, character.lower() if character.isascii() else "")
        if base not in _PLAIN:
            raise ValueError(f"character {character!r} at {position} has no key in layout {layout!r}")
        events += _key_events([Key.KEY_LEFTSHIFT, _PLAIN[base]])
    return events


def key_named(name: str) -> Key:
    """The key of a name: `f1`, `delete`, `ctrl`, `KEY_A`, or the character that it gives.

    Raises:
        ValueError: there is none of that name.
    """
    lowered = name.lower()
    if lowered in _ALIASES:
        return _ALIASES[lowered]
    if lowered in _PLAIN:
        return _PLAIN[lowered]
    member = lowered.upper() if lowered.startswith("key_") else f"KEY_{lowered.upper()}"
    if member in Key.__members__:
        return Key[member]
    raise ValueError(
        f"there is no key {name!r}; names are those of evdev without KEY_, such as enter, f1, up"
    )


def combo_to_events(combo: str) -> list[Event]:
    """The events of keys pressed together, such as `ctrl-alt-delete`; `minus` is the key of `-`.

    Raises:
        ValueError: a name is unknown or empty.
    """
    names = combo.replace("+", "-").split("-")
    if not all(names):
        raise ValueError(f"keys {combo!r}; write names joined by -, such as ctrl-alt-delete")
    return _key_events([key_named(name) for name in names])

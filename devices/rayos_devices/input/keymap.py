"""The keys to press for a text or a named combination.

A layout is what the *guest* has loaded: it turns keys into characters, we go the other way. A character is a list of
strokes, a stroke is a key with what is held meanwhile; most are one stroke, a dead key makes two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from rayos_devices.input.codes import Key
from rayos_devices.input.model import Event
from rayos_devices.input.report import SYN
from rayos_devices.input.wire import EventType

#: A key, and the modifiers held while it is pressed.
Stroke = tuple[Key, tuple[Key, ...]]
Layout = Mapping[str, tuple[Stroke, ...]]

_SHIFT: Final = (Key.KEY_LEFTSHIFT,)
_ALTGR: Final = (Key.KEY_RIGHTALT,)

#: The printing keys of a PC's main block, row by row.
_BLOCK: Final = (
    *(Key.KEY_GRAVE, *(Key(code) for code in range(Key.KEY_1, Key.KEY_EQUAL + 1))),
    *(Key(code) for code in range(Key.KEY_Q, Key.KEY_RIGHTBRACE + 1)),
    *(Key(code) for code in range(Key.KEY_A, Key.KEY_APOSTROPHE + 1)),
    Key.KEY_BACKSLASH,
    Key.KEY_102ND,
    *(Key(code) for code in range(Key.KEY_Z, Key.KEY_SLASH + 1)),
)
_EVERYWHERE: Final[Layout] = {
    " ": ((Key.KEY_SPACE, ()),),
    "\n": ((Key.KEY_ENTER, ()),),
    "\r": ((Key.KEY_ENTER, ()),),
    "\t": ((Key.KEY_TAB, ()),),
    "\b": ((Key.KEY_BACKSPACE, ()),),
    "\x7f": ((Key.KEY_BACKSPACE, ()),),
    "\x1b": ((Key.KEY_ESC, ()),),
}


def _layout(plain: str, shifted: str, altgr: str = "") -> dict[str, tuple[Stroke, ...]]:
    """A layout from its characters in the order of _BLOCK; a blank is a key without one."""
    table = dict(_EVERYWHERE)
    for characters, held in ((altgr, _ALTGR), (shifted, _SHIFT), (plain, ())):
        for key, character in zip(_BLOCK, characters, strict=False):
            if character != " ":
                table[character] = ((key, held),)
    return table


def _with_dead_keys(
    table: dict[str, tuple[Stroke, ...]], marks: Mapping[str, Sequence[str]]
) -> dict[str, tuple[Stroke, ...]]:
    """Marks alone want a blank behind them; `marks` gives each its composed characters, of the letters in _VOWELS."""
    for mark, composed in marks.items():
        dead = table[mark]
        table[mark] = (*dead, *table[" "])
        for letter, character in zip(_VOWELS, composed, strict=True):
            if character != " ":
                table[character] = (*dead, *table[letter])
    return table


def _without(table: dict[str, tuple[Stroke, ...]], mark: str) -> dict[str, tuple[Stroke, ...]]:
    """The table without a dead key whose mark another key gives at once."""
    del table[mark]
    return table


_VOWELS: Final = "aeiouyAEIOUY"
_DEAD_CIRCUMFLEX: Final = "\N{COMBINING CIRCUMFLEX ACCENT}"

LAYOUTS: Final[Mapping[str, Layout]] = {
    "us": _layout(
        "`1234567890-=" + "qwertyuiop[]" + "asdfghjkl;'" + "\\ " + "zxcvbnm,./",
        "~!@#$%^&*()_+" + "QWERTYUIOP{}" + 'ASDFGHJKL:"' + "| " + "ZXCVBNM<>?",
    ),
    "de": _with_dead_keys(
        _layout(
            "^1234567890ß\N{ACUTE ACCENT}" + "qwertzuiopü+" + "asdfghjklöä" + "#<" + "yxcvbnm,.-",
            '°!"§$%&/()=?`' + "QWERTZUIOPÜ*" + "ASDFGHJKLÖÄ" + "'>" + "YXCVBNM;:_",
            "  ²³   {[]}\\ " + "@ €        ~" + "           " + " |" + "      µ   ",
        ),
        {"^": "âêîôû ÂÊÎÔÛ ", "\N{ACUTE ACCENT}": "áéíóúýÁÉÍÓÚÝ", "`": "àèìòù ÀÈÌÒÙ "},
    ),
    "fr": _without(
        _with_dead_keys(
            _layout(
                "²&é\"'(-è_çà)=" + f"azertyuiop{_DEAD_CIRCUMFLEX}$" + "qsdfghjklmù" + "*<" + "wxcvbn,;:!",
                " 1234567890°+" + "AZERTYUIOP¨£" + "QSDFGHJKLM%" + "µ>" + "WXCVBN?./§",
                "  ~#{[|`\\^@]}" + "  €        ¤",
            ),
            {_DEAD_CIRCUMFLEX: "âêîôû ÂÊÎÔÛ ", "¨": "äëïöüÿÄËÏÖÜ "},
        ),
        _DEAD_CIRCUMFLEX,
    ),
}

_ALIASES: Final[Mapping[str, Key]] = {
    "ctrl": Key.KEY_LEFTCTRL,
    "control": Key.KEY_LEFTCTRL,
    "shift": Key.KEY_LEFTSHIFT,
    "alt": Key.KEY_LEFTALT,
    "altgr": Key.KEY_RIGHTALT,
    "meta": Key.KEY_LEFTMETA,
    "super": Key.KEY_LEFTMETA,
    "win": Key.KEY_LEFTMETA,
    "cmd": Key.KEY_LEFTMETA,
    "menu": Key.KEY_COMPOSE,
    "escape": Key.KEY_ESC,
    "return": Key.KEY_ENTER,
    "ret": Key.KEY_ENTER,
    "del": Key.KEY_DELETE,
    "ins": Key.KEY_INSERT,
    "pgup": Key.KEY_PAGEUP,
    "pgdn": Key.KEY_PAGEDOWN,
    "spc": Key.KEY_SPACE,
    "print": Key.KEY_SYSRQ,
    "break": Key.KEY_PAUSE,
    "less": Key.KEY_102ND,
}

#: Every name a combination may use: aliases, evdev's names without KEY_, what a US keyboard prints without shift.
NAMES: Final[Mapping[str, Key]] = {
    **{character: strokes[0][0] for character, strokes in LAYOUTS["us"].items() if not strokes[0][1]},
    **{key.name.removeprefix("KEY_").lower(): key for key in Key},
    **_ALIASES,
}


def text_to_events(text: str, layout: str = "us") -> list[Event]:
    """Key presses and releases that type `text` into a guest with this keyboard layout.

    Errors: ValueError for a layout that is not known, or a character that it has no key for.
    """
    table = LAYOUTS.get(layout)
    if table is None:
        raise ValueError(f"keyboard layout {layout!r}: known are {', '.join(sorted(LAYOUTS))}")
    events: list[Event] = []
    held: tuple[Key, ...] = ()
    for position, character in enumerate(text):
        strokes = table.get(character)
        if strokes is None:
            allowed = "".join(sorted(known for known in table if known.isprintable()))
            raise ValueError(
                f"character {character!r} at position {position} is on no key of layout {layout!r}; "
                f"it has {allowed} and enter, tab, backspace, escape"
            )
        for key, wanted in strokes:
            if wanted != held:
                _hold(events, held, wanted)
                held = wanted
            _press(events, key)
    _hold(events, held, ())
    return events


def combo_to_events(combo: str) -> list[Event]:
    """Presses and releases of a combination like ``ctrl-alt-delete``, ``shift+f1`` or ``enter``.

    The keys go down in the order written and up in reverse. Errors: ValueError for a name that no key has, or one
    that comes twice.
    """
    keys: list[Key] = []
    for name in re.split(r"(?<=.)[-+](?=.)", combo.strip()):
        key = NAMES.get(name.lower()) or NAMES.get(name.lower().removeprefix("key_"))
        if key is None:
            raise ValueError(
                f"no key is called {name!r}: a letter, a digit, or one of "
                f"{', '.join(sorted(known for known in NAMES if len(known) > 1))}"
            )
        if key in keys:
            raise ValueError(f"{name!r} is twice in {combo!r}: a key can be held once")
        keys.append(key)
    events: list[Event] = []
    for key in keys:
        events += (EventType.KEY, key, 1), SYN
    for key in reversed(keys):
        events += (EventType.KEY, key, 0), SYN
    return events


def _press(events: list[Event], key: Key) -> None:
    events += (EventType.KEY, key, 1), SYN, (EventType.KEY, key, 0), SYN


def _hold(events: list[Event], held: Sequence[Key], wanted: Sequence[Key]) -> None:
    for key in held:
        events += (EventType.KEY, key, 0), SYN
    for key in wanted:
        events += (EventType.KEY, key, 1), SYN

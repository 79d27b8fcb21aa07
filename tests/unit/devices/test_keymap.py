"""Text becomes the keys that a person would press, and what has no key is refused."""

from __future__ import annotations

import string

import pytest

from devices.input.codes import Key
from devices.input.keymap import combo_to_events, text_to_events


def keys(events: list[tuple[int, int, int]]) -> list[tuple[str, int]]:
    return [(Key(code).name.removeprefix("KEY_"), value) for kind, code, value in events if kind == 1]


def test_text_is_typed_key_by_key_with_shift_where_needed() -> None:
    """Each press and each release is its own report."""
    assert keys(text_to_events("a")) == [("A", 1), ("A", 0)]
    assert keys(text_to_events("A!")) == [
        ("LEFTSHIFT", 1),
        ("A", 1),
        ("A", 0),
        ("LEFTSHIFT", 0),
        ("LEFTSHIFT", 1),
        ("1", 1),
        ("1", 0),
        ("LEFTSHIFT", 0),
    ]
    events = text_to_events("ls\n")
    assert events[1::2] == [(0, 0, 0)] * 6
    assert keys(events)[-1] == ("ENTER", 0)


def test_every_printable_character_has_a_key() -> None:
    """And all keys are up again after it."""
    for character in string.digits + string.ascii_letters + string.punctuation + " \t\n":
        pressed = keys(text_to_events(character))
        assert sorted(name for name, value in pressed if value) == sorted(
            name for name, value in pressed if not value
        )


def test_what_has_no_key_is_refused_with_its_place() -> None:
    """Nothing is typed half."""
    with pytest.raises(ValueError, match="character 'ü' at 2 has no key in layout 'us'"):
        text_to_events("abü")
    with pytest.raises(ValueError, match="layout 'xx'; allowed are us"):
        text_to_events("a", layout="xx")


def test_keys_together_go_down_in_order_and_up_in_reverse() -> None:
    """Names as people write them."""
    assert keys(combo_to_events("ctrl-alt-delete")) == [
        ("LEFTCTRL", 1),
        ("LEFTALT", 1),
        ("DELETE", 1),
        ("DELETE", 0),
        ("LEFTALT", 0),
        ("LEFTCTRL", 0),
    ]
    assert keys(combo_to_events("Shift+F1"))[1] == ("F1", 1)
    assert keys(combo_to_events("minus"))[0] == ("MINUS", 1)
    for wrong in ("", "ctrl-", "ctrl-nokey"):
        with pytest.raises(ValueError):
            combo_to_events(wrong)

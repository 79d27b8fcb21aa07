"""QEMU's command line as data: options with their values, and values as properties.

Source: qemu-options.hx (QEMU 10), and util/keyval.c for `name=value,name=value`, where a comma is doubled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: Options without a value; every other one has one.
FLAGS: Final = frozenset(
    {
        *(
            "h",
            "help",
            "version",
            "enable-kvm",
            "no-kvm",
            "nographic",
            "s",
            "S",
            "snapshot",
            "no-reboot",
            "no-shutdown",
        ),
        *(
            "daemonize",
            "nodefaults",
            "no-user-config",
            "full-screen",
            "no-fd-bootchk",
            "no-hpet",
            "no-acpi",
            "usb",
        ),
        *(
            "win2k-hack",
            "only-migratable",
            "singlestep",
            "mem-prealloc",
            "semihosting",
            "preconfig",
            "show-cursor",
        ),
        *(
            "alt-grab",
            "ctrl-grab",
            "no-quit",
            "portrait",
            "curses",
            "sdl",
            "enable-fips",
            "enable-sync-profile",
        ),
        *("xen-attach", "xen-domid-restrict", "old-param", "nouserconfig", "q", "explain"),
    }
)
#: One name for each option that has several.
ALIASES: Final = {"M": "machine", "help": "h", "nouserconfig": "no-user-config", "no-frame": "full-screen"}


class Unreadable(ValueError):
    """The command line cannot be read; the text is QEMU's own sentence for it."""


@dataclass(frozen=True, slots=True)
class Option:
    """`-NAME VALUE`; `value` is empty for a flag. A word that is no option is `-hda WORD`."""

    name: str
    value: str = ""

    def __str__(self) -> str:
        return f"-{self.name} {self.value}".rstrip()

    @property
    def words(self) -> tuple[str, ...]:
        """As QEMU takes it."""
        return (f"-{self.name}",) if self.name in FLAGS else (f"-{self.name}", self.value)


def parse(words: Sequence[str]) -> list[Option]:
    """The options of a command line (without the program's name), in their order.

    Raises:
        Unreadable: the last option lacks its value.
    """
    options, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            options.append(Option("hda", word))
            continue
        name = word.removeprefix("-").removeprefix("-")
        name = ALIASES.get(name, name)
        if name in FLAGS:
            options.append(Option(name))
        elif not rest:
            raise Unreadable(f"{word}: requires an argument")
        else:
            options.append(Option(name, rest.pop(0)))
    return options


def properties(text: str, first: str = "") -> dict[str, str]:
    """`a,b=c` as {first: "a", "b": "c"}; a word without `=` that is not the first is "on"."""
    found: dict[str, str] = {}
    for index, word in enumerate(_split(text)):
        name, equals, value = word.partition("=")
        if not equals and index == 0 and first:
            found[first] = word
        elif not equals and name.startswith("no") and name in ("nowait", "nodelay"):
            found[name.removeprefix("no")] = "off"
        else:
            found[name] = value if equals else "on"
    return found


def _split(text: str) -> list[str]:
    return [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",") if word]

"""A disk in a few words, as commands and tests write it: `64MiB`, `os.img,bus=ide`, `golden.qcow2,snapshot`, `fat:esp`.

The first word is a size, a file, or a directory after `fat:`; the others are keys of a disk, of which a flag may stand
alone. The format of a file is told by its name and never by its content, which may be a guest's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, get_args

from rayos_vmm.config.spec import DiskFormat
from rayos_vmm.config.units import parse_size, spell_size

FAT: Final = "fat:"
_FLAGS: Final = ("snapshot", "read_only")
_KEYS: Final = ("bus", "cache", "format", "logical_block_size", "queues", "serial")
_NUMBERS: Final = ("logical_block_size", "queues")


def parse_disk(text: str) -> dict[str, Any]:
    """The table of a disk.

    Raises:
        ValueError: it is no size and no file, or a word is no key; the message says what is allowed.
    """
    first, *words = (text,) if Path(text).exists() else text.split(",")
    table = _source(first)
    for word in words:
        key, separator, value = word.partition("=")
        key = key.replace("-", "_")
        if not separator and key in _FLAGS:
            table[key] = True
        elif separator and key in _KEYS:
            table[key] = int(value) if key in _NUMBERS and value.isdecimal() else value
        else:
            known = ", ".join((*_FLAGS, *(f"{one}=…" for one in _KEYS)))
            raise ValueError(f"{text}: {word!r} is none of {known}")
    return table


def _source(text: str) -> dict[str, Any]:
    if text.startswith(FAT):
        return {"directory": text.removeprefix(FAT)}
    if "/" in text or Path(text).exists():
        suffix = Path(text).suffix.lstrip(".")
        return {"path": text, "format": suffix} if suffix in get_args(DiskFormat) else {"path": text}
    try:
        parse_size(text)
    except ValueError as error:
        raise ValueError(f"{text}: there is no such file, and {error}") from None
    return {"size": spell_size(text)}

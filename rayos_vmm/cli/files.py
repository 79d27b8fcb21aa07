"""Files on this side, with errors in words."""

from __future__ import annotations

import stat
from pathlib import Path

from rayos_vmm.errors import Invalid


def write_file(path: str, data: bytes, *, name_in_folder: str = "") -> Path:
    """Writes `path`, or `name_in_folder` in it where it is a folder; returns what was written.

    Raises:
        Invalid: it cannot be written.
    """
    target = Path(path) / name_in_folder if name_in_folder and Path(path).is_dir() else Path(path)
    try:
        target.write_bytes(data)
    except OSError as error:
        raise Invalid(f"{target}: {error.strerror}") from None
    return target


def read_file(path: str) -> tuple[bytes, int]:
    """(content, permission bits).

    Raises:
        Invalid: it cannot be read.
    """
    try:
        return Path(path).read_bytes(), stat.S_IMODE(Path(path).stat().st_mode)
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}") from None

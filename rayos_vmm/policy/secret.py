"""Secrets of this installation in files: made once, whole or not at all, readable by their owner alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def load_secret(path: Path, make: Callable[[], bytes]) -> bytes:
    """Returns the contents of `path`; when there is no such file, those that `make` gives, on disk when this returns.

    Raises:
        OSError: it cannot be read or written.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        data = make()
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)  # of a service that was killed
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return data

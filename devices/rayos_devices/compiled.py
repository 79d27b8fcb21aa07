"""The compiled form of the data path: found when it fits the sources, ignored when it does not.

A few modules of `devices` (`MODULES`) are ordinary Python whose C types stand beside them in `.pxd` files. `python -P
-m rayos_devices.build` compiles them into ``devices/rayos_devices/_compiled/<fingerprint>/``, where the fingerprint
is that of every source that went in, so an extension that is older than its source is never loaded: the same files
then run interpreted. All or nothing: compiled modules share C structures, so there is no half-way.

``RAYOS_PURE=1`` asks for interpreted code. `is_compiled` and `describe` tell which it is.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final

#: In the order in which they import each other.
MODULES: Final = (
    "rayos_devices.native",
    "rayos_devices.gate",
    "rayos_devices.stats",
    "rayos_devices.metrics",
    "rayos_devices.virtio.memory",
    "rayos_devices.virtio.packed",
    "rayos_devices.virtio.vring",
    "rayos_devices.uring",
    "rayos_devices.blk.flight",
    "rayos_devices.bucket",
    "rayos_devices.blk.ring",
    "rayos_devices.net.queue",
    "rayos_devices.net.path",
    "rayos_devices.net.capture",
    "rayos_devices.net.filter",
    "rayos_devices.net.ring",
)
PURE_VARIABLE: Final = "RAYOS_PURE"

_PACKAGE: Final = Path(__file__).parent
_COMPILED: Final = _PACKAGE / "_compiled"
_SUFFIX: Final = EXTENSION_SUFFIXES[0]


def source(module: str) -> Path:
    """The Python source of one of MODULES."""
    return _PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def fingerprint(*modules: str) -> str:
    """Names the sources (of all MODULES, or these), how they are compiled, and for which interpreter."""
    digest = hashlib.sha256(_SUFFIX.encode())
    types = [source(module).with_suffix(".pxd") for module in MODULES]
    for file in (_PACKAGE / "build.py", *types, *map(source, modules or MODULES)):
        if file.exists():
            digest.update(b"\0" + file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def directory() -> Path:
    """Where the extensions of today's sources are, or would be."""
    return _COMPILED / fingerprint()


def extension(folder: Path, module: str) -> Path:
    """A module's file in such a directory."""
    return folder / (module + _SUFFIX)


class Finder:
    """Imports MODULES from their extensions (importlib's protocol of a meta path finder)."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self._files.get(name)
        return None if file is None else spec_from_file_location(name, file)


def _find() -> tuple[dict[str, Path], str]:
    """The extensions that fit, or none and why."""
    if os.environ.get(PURE_VARIABLE, "") not in ("", "0"):
        return {}, f"interpreted: {PURE_VARIABLE} is set"
    folder = directory()
    files = {module: extension(folder, module) for module in MODULES}
    if all(file.exists() for file in files.values()):
        return files, "compiled"
    if _COMPILED.is_dir():
        return {}, "interpreted: the sources changed since the last build (make build)"
    return {}, "interpreted: never built (make build)"


_files, _reason = _find()


def install() -> None:
    """Let later imports of MODULES find their extensions; called once, when `devices` is imported."""
    if _files:
        sys.meta_path.insert(0, Finder(_files))


def is_compiled() -> bool:
    """Whether this process runs the data path compiled."""
    return bool(_files)


def describe() -> str:
    """`compiled`, or `interpreted:` and why."""
    return _reason

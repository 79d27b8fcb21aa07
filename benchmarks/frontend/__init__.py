"""The driver's side of the benchmarks: a vhost-user session, and loads compiled to be faster than any server."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from rayos_devices.build import compile_extension

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
LOADS = ("load", "netload")


def build_loads() -> None:
    """Compile the loads if they changed, and import them. Errors: BuildError."""
    folder = _ROOT / "build" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    for name in LOADS:
        source = _HERE / f"{name}.py"
        target = folder / (name + EXTENSION_SUFFIXES[0])
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            compile_extension(source, _ROOT, target, annotation_typing="True")
        module = f"benchmarks.frontend.{name}"
        spec = importlib.util.spec_from_file_location(module, target)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[module] = loaded
        spec.loader.exec_module(loaded)

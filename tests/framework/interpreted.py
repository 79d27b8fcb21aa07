"""Modules of the data path as plain Python, whether or not they are compiled: to look into, or to be killed in."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import rayos_devices.virtio


def interpreted(name: str, **replaced: ModuleType) -> ModuleType:
    """A module of rayos_devices.virtio, with others `replaced` in its imports."""
    path = Path(rayos_devices.virtio.__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"interpreted_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    loaded = {spec.name: module} | {
        f"rayos_devices.virtio.{other}": module for other, module in replaced.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        for other, instead in loaded.items():
            patch.setitem(sys.modules, other, instead)
        spec.loader.exec_module(module)
    return module

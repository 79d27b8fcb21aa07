"""The compiled data path: used when it fits its sources, never else, and nobody else knows the difference."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayos_devices import compiled

ROOT = Path(__file__).resolve().parents[3]


def imports() -> Iterator[tuple[str, str, str]]:
    """(file, module, name) of everything that is imported out of a compiled module."""
    for package in ("devices", "rayos_vmm", "tests", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.ImportFrom) and node.module in compiled.MODULES:
                    for alias in node.names:
                        yield str(path.relative_to(ROOT)), node.module, alias.name


def test_what_others_import_from_compiled_modules_is_there() -> None:
    """A constant that its .pxd makes a C integer cannot be imported: it belongs into a module that is not compiled."""
    inside = {str(compiled.source(module).relative_to(ROOT)) for module in compiled.MODULES}
    missing = [
        f"{file}: {module}.{name}"
        for file, module, name in imports()
        if file not in inside and not hasattr(importlib.import_module(module), name)
    ]
    assert missing == []


def ask(root: Path, **environment: str) -> str:
    """How the data path of a copy describes itself, and whether its rings then load."""
    code = "import rayos_devices.blk.ring; from rayos_devices import compiled; print(compiled.describe())"
    clean = {key: value for key, value in os.environ.items() if key != compiled.PURE_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(
        ROOT / "devices" / "rayos_devices",
        tmp_path / "rayos_devices",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path


def test_a_changed_source_is_never_run_from_an_old_build(copy: Path) -> None:
    """Sources first: what was compiled from others is not loaded, and the reason is told."""
    with (copy / "rayos_devices" / "blk" / "ring.py").open("a") as file:
        file.write("\n# changed\n")
    assert ask(copy).startswith("interpreted: ")


def test_pure_can_be_asked_for(copy: Path) -> None:
    assert ask(copy, RAYOS_PURE="1") == "interpreted: RAYOS_PURE is set"


def test_the_same_process_says_what_it_runs() -> None:
    """The extension's file is the proof."""
    native = importlib.import_module("rayos_devices.native")
    assert str(native.__file__).endswith(".so") is compiled.is_compiled()

"""The two floors: four libraries that know nothing of each other, and the service that joins them.

A wrong arrow would make a library unusable alone; a generic name (`net`, `devices`) that resolves
outside this tree would run somebody else's code.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: A folder of this repository holds one importable package, whose name is nobody else's.
FOLDERS = {
    "rayos_devices": "devices/rayos_devices",
    "rayos_net": "net/rayos_net",
    "rayos_tpm": "tpm/rayos_tpm",
    "rayos_images": "images/rayos_images",
    "rayos_vmm": "rayos_vmm",
}
PACKAGES = tuple(FOLDERS)
LIBRARIES = PACKAGES[:-1]
#: The folders of rayos_vmm, top to bottom. A module imports from its own folder and from rows below it; the folders of
#: a row do not import each other. The last row lies at the root, as one folder, and nothing else does.
ROWS = (
    ("dropin",),
    ("cli",),
    ("testing",),
    ("client",),
    ("api",),
    ("contract",),
    ("service",),
    ("guest",),
    ("machine",),
    ("hardware", "network"),
    ("qemu",),
    ("worker",),
    ("policy",),
    ("host",),
    ("shared",),
    ("config",),
    ("errors", "events", "paths"),
)
ROOT_MODULES = ROWS[-1]
ROW = {folder: number for number, row in enumerate(ROWS) for folder in row}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / FOLDERS[package]).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file, those inside functions and `if TYPE_CHECKING` too."""
    parts = path.relative_to(ROOT).with_suffix("").parts  # no import of ours is relative
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ".".join(parts[: len(parts) - node.level])
                yield node.lineno, f"{base}.{node.module}" if node.module else base
            else:
                yield node.lineno, node.module or ""


def modules() -> dict[str, Path]:
    """Every module of ours, by its dotted name; a package by that of its `__init__`."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sources(package):
            parts = path.relative_to((ROOT / folder).parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported_modules() -> dict[str, dict[str, int]]:
    """The modules of ours that each imports, with the line; `from package import module` counts as the module."""
    ours = modules()
    arrows: dict[str, dict[str, int]] = {name: {} for name in ours}
    for name, path in ours.items():
        for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif node.module:
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [full if full in ours else node.module for full in inside]
            for target in targets:
                if target in ours:
                    arrows[name].setdefault(target, node.lineno)
    return arrows


@pytest.mark.parametrize("package", LIBRARIES)
def test_a_library_imports_neither_its_sisters_nor_the_service(package: str) -> None:
    """Each library is usable alone."""
    forbidden = set(PACKAGES) - {package}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}"
        for path in sources(package)
        for line, module in imported(path)
        if module.split(".")[0] in forbidden
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_the_tests(package: str) -> None:
    """Shipped packages do not need the tests."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources(package)
        for line, module in imported(path)
        if module.split(".")[0] == "tests"
    ]
    assert wrong == []


def test_every_import_of_ours_resolves_inside_this_tree(tmp_path: Path) -> None:
    """From anywhere, without the current directory on the path, `net` is our `net`."""
    used = {
        module
        for package in PACKAGES
        for path in sources(package)
        for _, module in imported(path)
        if module.split(".")[0] in PACKAGES
    } | set(PACKAGES)
    script = (
        "import importlib.util, json, sys\n"
        "found = {m: getattr(importlib.util.find_spec(m), 'origin', None) for m in json.load(sys.stdin)}\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        input=json.dumps(sorted(used)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    outside = {m: o for m, o in found.items() if o is None or not Path(o).resolve().is_relative_to(ROOT)}
    assert outside == {}


def test_no_installed_distribution_brings_a_module_of_our_names() -> None:
    """A dependency that ships a top-level `net` or `tests` would win or lose by the order of the path."""
    shadows = [
        str(entry / name)
        for entry in map(Path, sys.path)
        if entry.name == "site-packages"
        for name in (*PACKAGES, "tests")
        if (entry / name).exists() or (entry / f"{name}.py").exists()
    ]
    assert shadows == []


def test_nothing_lies_loose_at_the_root_of_the_service() -> None:
    """Every noun is a folder, and every folder has its row."""
    root = ROOT / FOLDERS["rayos_vmm"]
    there = {path.stem for path in root.glob("*.py")} | {
        path.parent.name for path in root.glob("*/__init__.py")
    }
    assert there - {"__init__"} == set(ROW)
    assert {path.stem for path in root.glob("*.py")} - {"__init__"} == set(ROOT_MODULES)


def test_every_arrow_of_the_service_points_down() -> None:
    """An import upward or sideways fails, also one for type checking alone."""
    wrong = []
    for name, targets in imported_modules().items():
        for target, line in targets.items():
            if not (name.startswith("rayos_vmm.") and target.startswith("rayos_vmm.")):
                continue
            folder, other = name.split(".")[1], target.split(".")[1]
            if {folder, other} <= set(ROOT_MODULES):
                continue
            if folder != other and ROW[folder] >= ROW[other]:
                wrong.append(f"{name}:{line}: imports {target}")
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    """No circles, neither in a folder nor between two, in the libraries either."""
    waiting = {name: set(targets) for name, targets in imported_modules().items()}
    while free := {name for name, targets in waiting.items() if not targets & waiting.keys()}:
        waiting = {name: targets for name, targets in waiting.items() if name not in free}
    # What is left is in a circle, or imports what is.
    assert {name: sorted(targets & waiting.keys()) for name, targets in waiting.items()} == {}

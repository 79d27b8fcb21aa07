"""The wheel in projects that have folders of our former names: each finds its own modules, and ours."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OWN = "WHOSE = 'the project'\n"
TEST = """
from {name} import WHOSE
from rayos_vmm.testing.sync import open_guest
import rayos_devices, rayos_net, rayos_tpm, rayos_images

def test_both(request):
    assert WHOSE == "the project"
    assert callable(open_guest)
    assert request.config.pluginmanager.has_plugin("rayos")
"""
#: Where a project has a module of its own, and by which name its test imports it.
LAYOUTS = {
    "a folder net": ("net/__init__.py", "net"),
    "a folder devices": ("devices/__init__.py", "devices"),
    "a folder without __init__": ("tpm/whose.py", "tpm.whose"),
    "a module images": ("images.py", "images"),
    "below src": ("src/net/__init__.py", "net"),
    "inside tests": ("tests/net/__init__.py", "net"),
    "inside tests, a module": ("tests/devices.py", "devices"),
    "deeper": ("net/drivers/tpm.py", "net.drivers.tpm"),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents, as an installer lays them."""
    folder = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_has_our_packages_and_nothing_else(installed: Path) -> None:
    """No top-level name that a project may have."""
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"rayos_vmm", "rayos_devices", "rayos_net", "rayos_tpm", "rayos_images"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_project_of_such_a_layout_works(installed: Path, tmp_path: Path, layout: str) -> None:
    """pytest's plugin, the project's module and ours, all three in one test."""
    file, name = LAYOUTS[layout]
    module = tmp_path / file
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text(OWN)
    test = tmp_path / "tests" / "test_layout.py"
    test.parent.mkdir(exist_ok=True)
    test.write_text(TEST.format(name=name))
    (tmp_path / "conftest.py").write_text("")
    source = str(tmp_path / "src") if file.startswith("src/") else str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((source, str(installed)))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr

"""Where the hostile tests run: every device on a loop in this process, and in a sandboxed worker behind its keeper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rayos_devices.backend import Backend
from tests.framework.hostile import DEVICES, Device
from tests.framework.kept import close_shared_parent
from tests.framework.target import Served, Stepped


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """Started when first asked for, and still alive when the module's tests are over."""
    with ExitStack() as stack:
        running: dict[str, Served] = {}

        class Lazy(dict[str, Served]):
            def __missing__(self, name: str) -> Served:
                directory = tmp_path_factory.mktemp(name)
                self[name] = stack.enter_context(DEVICES[name].served(directory))
                self[name].count_idle_fds()
                return self[name]

        running = Lazy()
        yield running


@pytest.fixture(scope="session", autouse=True)
def _no_parent_is_left() -> Iterator[None]:
    yield
    close_shared_parent()


@pytest.fixture(params=["stepped", "served"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def target(
    device: Device, where: str, processes: dict[str, Served], tmp_path: Path
) -> Iterator[Stepped[Backend] | Served]:
    """The `device` of the test, freshly made or in its process."""
    if where == "served":
        yield processes[device.name]
    else:
        with device.stepped(tmp_path) as stepped:
            yield stepped

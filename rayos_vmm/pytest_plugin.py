"""pytest fixtures for guests, loaded by itself where the package is installed.

    async def test_disk(guest_factory):
        async with guest_factory(disk="64MiB") as guest:
            await guest.succeed("dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync")
            await guest.console.expect("login:")

Such a test runs under trio. All tests of a session share one private daemon. A test that fails leaves its
guests' consoles, state and last frame in `artifacts/<test>/`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import pytest

if TYPE_CHECKING:
    from rayos_vmm.testing import Guest, PrivateDaemon

ARTIFACTS: Final = "artifacts"


class GuestFactory(Protocol):
    """Opens guests; the arguments are those of `rayos_vmm.testing.open_guest` without the daemon."""

    def __call__(self, **options: Any) -> AbstractAsyncContextManager[Guest]: ...


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    test = pyfuncitem.obj
    if "guest_factory" not in pyfuncitem.fixturenames or not inspect.iscoroutinefunction(test):
        return None
    import trio

    names = pyfuncitem._fixtureinfo.argnames
    trio.run(partial(test, **{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="session")
def rayos_daemon() -> Iterator[PrivateDaemon]:
    """A daemon for this session alone; it and all of its guests are gone at the session's end."""
    from rayos_vmm.testing import open_private_daemon

    with open_private_daemon() as daemon:
        yield daemon


@pytest.fixture
def guest_factory(request: pytest.FixtureRequest, rayos_daemon: PrivateDaemon) -> GuestFactory:
    """Opens guests that are gone when their block ends."""
    from rayos_vmm.testing import open_guest

    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", request.node.nodeid.rpartition("/")[2]).strip("-")
    return partial(open_guest, rayos_daemon, artifacts=Path(request.config.rootpath) / ARTIFACTS / name)

"""pytest fixtures for guests, loaded by itself where the package is installed.

    async def test_disk(guest_factory):
        async with guest_factory(disk="64MiB") as guest:
            await guest.succeed("dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync")
            await guest.console.expect("login:")

Such a test runs under trio. All tests of a session share one private daemon. A test that fails leaves its
guests' consoles, QMP transcript, state, statistics and last frame in `artifacts/<test>/`; with `--rayos-keep` its
guests run on, and the summary has the commands that get at them.
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


class GuestFactory(Protocol):
    """Opens guests; the arguments are those of `rayos_vmm.testing.open_guest` without the daemon."""

    def __call__(self, **options: Any) -> AbstractAsyncContextManager[Guest]: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rayos", "guests of rayos")
    group.addoption(
        "--rayos-artifacts",
        metavar="DIR",
        default="artifacts",
        help="where failed tests leave consoles, QMP transcript, state and last frame (default: artifacts)",
    )
    group.addoption(
        "--rayos-keep", action="store_true", help="guests of failed tests run on, and say how to get at them"
    )
    group.addoption(
        "--rayos-kernel",
        metavar="FILE",
        help="boot guests that name no kernel from this one, not from RayOS's",
    )
    group.addoption(
        "--rayos-timeout",
        metavar="SECONDS",
        type=float,
        help="how long a guest may take until it is ready, where a test does not say (default: 180)",
    )


_DAEMON: Final = pytest.StashKey["PrivateDaemon"]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    daemon = config.stash.get(_DAEMON, None)
    if daemon is not None and daemon.kept:
        terminalreporter.section("rayos guests that were kept")
        for name in daemon.kept:
            terminalreporter.write_line(f"RAYOS_RUNTIME_DIR={daemon.paths.runtime} rayos console {name}")
        terminalreporter.write_line(f"to end them: {daemon.how_to_end()}")


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
def rayos_daemon(request: pytest.FixtureRequest) -> Iterator[PrivateDaemon]:
    """A daemon for this session alone; it and all of its guests are gone at the session's end."""
    from rayos_vmm.testing import open_private_daemon

    with open_private_daemon() as daemon:
        request.config.stash[_DAEMON] = daemon
        yield daemon


@pytest.fixture
def guest_factory(request: pytest.FixtureRequest, rayos_daemon: PrivateDaemon) -> GuestFactory:
    """Opens guests that are gone when their block ends."""
    from rayos_vmm.testing import open_guest

    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", request.node.nodeid.rpartition("/")[2]).strip("-")
    option = request.config.getoption
    defaults: dict[str, Any] = {
        "artifacts": Path(request.config.rootpath) / option("--rayos-artifacts") / name
    }
    if option("--rayos-keep"):
        defaults["is_kept"] = True
    if option("--rayos-kernel"):
        defaults["kernel"] = option("--rayos-kernel")
    if option("--rayos-timeout"):
        defaults["timeout"] = option("--rayos-timeout")
    return partial(open_guest, rayos_daemon, **defaults)

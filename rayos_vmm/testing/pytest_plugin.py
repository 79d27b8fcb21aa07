"""pytest fixtures for guests, loaded by itself where the package is installed.

    async def test_disk(guest_factory):
        async with guest_factory(disk="64MiB") as guest:
            await guest.succeed("dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync")
            await guest.console.expect("login:")

Such a test runs under trio. In a plain `def test_*` the factory gives guests of `testing.sync` (`with guest_factory()
as guest: guest.succeed(…)`), in one that is marked `asyncio` or `anyio` those of `testing.aio`.

`class_guest_factory`, `module_guest_factory`, `package_guest_factory` and `session_guest_factory` boot a guest that
serves many tests, for a fixture of that scope:

    @pytest.fixture(scope="module")
    def guest(module_guest_factory):
        return module_guest_factory(disk="64MiB")

All tests of a session share one private daemon. A test that fails leaves its guests' consoles, QMP transcript, state,
statistics and last frame in `artifacts/<test>/`; with `--rayos-keep` its guests run on, and the summary has the
commands that get at them.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
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


def _is_ours(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    return type(excinfo.value).__module__.partition(".")[0] == "rayos_vmm"


def _hide_frames() -> None:
    """Has pytest leave out our frames from the report of an error of ours (all are there with `--full-trace`)."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "rayos_vmm":
            module.__dict__.setdefault("__tracebackhide__", _is_ours)


@pytest.hookimpl(tryfirst=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Says how to attach to the guests that `--pdb` holds, before the debugger's prompt."""
    daemon = node.config.stash.get(_DAEMON, None)
    reporter = node.config.pluginmanager.get_plugin("terminalreporter")
    capture = node.config.pluginmanager.get_plugin("capturemanager")
    if daemon is None or reporter is None or capture is None or not daemon.held:
        return
    with capture.global_and_fixture_disabled():
        for name in daemon.held:
            reporter.write_line(
                f"{name} is held: RAYOS_RUNTIME_DIR={daemon.paths.runtime} rayos console {name}"
            )


#: Markers of plugins that run a test themselves.
_OTHERS: Final = ("asyncio", "anyio")
_FACTORIES: Final = frozenset(
    ("guest_factory", *(f"{scope}_guest_factory" for scope in ("class", "module", "package", "session")))
)


def _is_for_others(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in _OTHERS)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    test = pyfuncitem.obj
    if _FACTORIES.isdisjoint(pyfuncitem.fixturenames) or not inspect.iscoroutinefunction(test):
        return None
    if _is_for_others(pyfuncitem):
        return None
    import trio

    names = pyfuncitem._fixtureinfo.argnames
    trio.run(partial(test, **{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="session")
def rayos_daemon(request: pytest.FixtureRequest) -> Iterator[PrivateDaemon]:
    """A daemon for this session alone; it and all of its guests are gone at the session's end."""
    from rayos_vmm.testing import aio, open_private_daemon, sync  # noqa: F401 - their frames are hidden, too

    with open_private_daemon() as daemon:
        request.config.stash[_DAEMON] = daemon
        _hide_frames()
        yield daemon


def _options(config: pytest.Config, nodeid: str) -> dict[str, Any]:
    """The options of the command line, for the guests of one test or fixture."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", nodeid.rpartition("/")[2]).strip("-") or "session"
    option = config.getoption
    options: dict[str, Any] = {"artifacts": Path(config.rootpath) / option("--rayos-artifacts") / name}
    if option("--rayos-keep"):
        options["is_kept"] = True
    if option("usepdb", False):
        options["is_held"] = True
    if option("--rayos-kernel"):
        options["kernel"] = option("--rayos-kernel")
    if option("--rayos-timeout"):
        options["timeout"] = option("--rayos-timeout")
    return options


@pytest.fixture
def guest_factory(request: pytest.FixtureRequest, rayos_daemon: PrivateDaemon) -> GuestFactory:
    """Opens guests that are gone when their block ends; the face (trio, asyncio, none) is the test's own."""
    from rayos_vmm.testing import aio, open_guest, sync

    node = request.node
    opener: Any = open_guest
    if _is_for_others(node):
        opener = aio.open_guest
    elif not inspect.iscoroutinefunction(getattr(node, "obj", None)):
        opener = sync.open_guest
    return partial(opener, rayos_daemon, **_options(request.config, node.nodeid))


def _scoped(request: pytest.FixtureRequest, daemon: PrivateDaemon) -> Iterator[Callable[..., Any]]:
    """Boots guests that stay until the end of the fixture's scope."""
    from rayos_vmm.testing import sync

    defaults = _options(request.config, request.node.nodeid)
    with ExitStack() as stack:

        def boot(**options: Any) -> sync.Guest:
            return stack.enter_context(sync.open_guest(daemon, **{**defaults, **options}))

        yield boot


@pytest.fixture(scope="class")
def class_guest_factory(
    request: pytest.FixtureRequest, rayos_daemon: PrivateDaemon
) -> Iterator[Callable[..., Any]]:
    """Boots guests for all tests of a class; a call returns the guest, of `testing.sync`."""
    yield from _scoped(request, rayos_daemon)


@pytest.fixture(scope="module")
def module_guest_factory(
    request: pytest.FixtureRequest, rayos_daemon: PrivateDaemon
) -> Iterator[Callable[..., Any]]:
    """Boots guests for all tests of a module; a call returns the guest, of `testing.sync`."""
    yield from _scoped(request, rayos_daemon)


@pytest.fixture(scope="package")
def package_guest_factory(
    request: pytest.FixtureRequest, rayos_daemon: PrivateDaemon
) -> Iterator[Callable[..., Any]]:
    """Boots guests for all tests of a package; a call returns the guest, of `testing.sync`."""
    yield from _scoped(request, rayos_daemon)


@pytest.fixture(scope="session")
def session_guest_factory(
    request: pytest.FixtureRequest, rayos_daemon: PrivateDaemon
) -> Iterator[Callable[..., Any]]:
    """Boots guests for all tests of a session; a call returns the guest, of `testing.sync`."""
    yield from _scoped(request, rayos_daemon)

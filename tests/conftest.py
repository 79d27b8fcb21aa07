"""How the tests run: async tests under trio, nothing skipped in CI, nothing left behind.

Invariants of a session:
* `async def test_*` runs under trio with a deadline; a test that hangs fails with its traceback.
* With `CI` set, a skipped test fails the session: a green run has run everything.
* No process that a test started, no network link and no temporary directory of ours outlives the session.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import Any, Final

import pytest
import trio

from rayos_devices.compiled import describe, is_compiled
from rayos_vmm.testing.leftovers import Leftovers

ASYNC_TEST_LIMIT_S: Final = 600.0


def _under_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    async def limited(**arguments: Any) -> None:
        with trio.fail_after(ASYNC_TEST_LIMIT_S):
            await test(**arguments)

    @wraps(test)
    def run(**arguments: Any) -> None:
        trio.run(partial(limited, **arguments))

    return run


def pytest_report_header() -> str:
    return f"data path: {describe()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that kill at Python instructions find none in compiled code; `make test` runs them interpreted."""
    if is_compiled():
        away = {item for item in items if item.get_closest_marker("interpreted")}
        config.hook.pytest_deselected(items=list(away))
        items[:] = [item for item in items if item not in away]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    test = pyfuncitem.obj
    hypothesis = getattr(test, "hypothesis", None)
    if hypothesis is not None and inspect.iscoroutinefunction(hypothesis.inner_test):
        hypothesis.inner_test = _under_trio(hypothesis.inner_test)
        return None
    if not inspect.iscoroutinefunction(test):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    _under_trio(test)(**{name: pyfuncitem.funcargs[name] for name in names})
    return True


_before: Final = pytest.StashKey[Leftovers]()
_failures: Final = pytest.StashKey[list[str]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_before] = Leftovers.now()
    session.config.stash[_failures] = []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    failures = session.config.stash[_failures]
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None:
        failures += [f"skipped: {report.nodeid}" for report in reporter.stats.get("skipped", [])]
    failures += [f"left behind: {what}" for what in session.config.stash[_before].wait_gone()]
    if failures and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for failure in config.stash[_failures]:
        terminalreporter.write_line(f"FAILED {failure}", red=True)

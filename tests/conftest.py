"""How the tests run: async tests under trio, nothing skipped in CI, nothing left behind.

Invariants of a session:
* `async def test_*` runs under trio with a deadline; a test that hangs fails with its traceback.
* With `CI` set, a skipped test fails the session: a green run has run everything.
* No process that a test started, and no network link with our prefix, outlives the session.
"""

from __future__ import annotations

import inspect
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any, Final

import pytest
import trio

ASYNC_TEST_LIMIT_S: Final = 600.0
LEAK_GRACE_S: Final = 5.0
LINK_PREFIX: Final = "ray"

# Children inherit it, so a process that a test leaves behind is told from everybody else's.
SESSION_VARIABLE: Final = "RAYOS_TEST_SESSION"


def _under_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    async def limited(**arguments: Any) -> None:
        with trio.fail_after(ASYNC_TEST_LIMIT_S):
            await test(**arguments)

    @wraps(test)
    def run(**arguments: Any) -> None:
        trio.run(partial(limited, **arguments))

    return run


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


def _links() -> set[str]:
    return {link.name for link in Path("/sys/class/net").iterdir() if link.name.startswith(LINK_PREFIX)}


def _processes(session: str) -> Iterator[str]:
    """The processes that carry this session's mark, other than this one."""
    mark = f"{SESSION_VARIABLE}={session}".encode()
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal() or int(directory.name) == os.getpid():
            continue
        try:
            if mark in (directory / "environ").read_bytes().split(b"\0"):
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield f"process {directory.name}: {command.strip()[:120]}"
        except OSError:
            continue  # it ended meanwhile, or belongs to somebody else


_before: Final = pytest.StashKey[set[str]]()
_failures: Final = pytest.StashKey[list[str]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    os.environ[SESSION_VARIABLE] = uuid.uuid4().hex
    session.config.stash[_before] = _links()
    session.config.stash[_failures] = []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    failures = session.config.stash[_failures]
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None:
        failures += [f"skipped: {report.nodeid}" for report in reporter.stats.get("skipped", [])]
    deadline = time.monotonic() + LEAK_GRACE_S
    while leaks := [
        *_processes(os.environ[SESSION_VARIABLE]),
        *(f"link {name}" for name in sorted(_links() - session.config.stash[_before])),
    ]:
        if time.monotonic() > deadline:
            failures += [f"left behind: {leak}" for leak in leaks]
            break
        time.sleep(0.1)
    if failures and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for failure in config.stash[_failures]:
        terminalreporter.write_line(f"FAILED {failure}", red=True)

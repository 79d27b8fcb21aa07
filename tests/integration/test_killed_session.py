"""A test session that dies leaves nothing: its daemon, machines and bridge end with it, in every way it can end."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from rayos_vmm.testing.leftovers import Leftovers

pytestmark = [pytest.mark.guest, pytest.mark.root]

TEST = """
import time

async def test_waits(guest_factory):
    async with guest_factory(tpm=False, gpu={"enabled": False}, wait="running") as guest:
        print("running", flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize(
    "kind", (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT), ids=lambda kind: kind.name
)
def test_a_session_that_is_killed_leaves_nothing(pytester: pytest.Pytester, kind: signal.Signals) -> None:
    """No process, no bridge, no directory of the session is there afterwards."""
    before = Leftovers.now()
    path = pytester.makepyfile(TEST)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "pytest", "-q", "-s", str(path)], stdout=subprocess.PIPE, text=True
    ) as session:
        assert session.stdout is not None
        while "running" not in (line := session.stdout.readline()):
            assert line, "the session ended before its guest ran"
        session.send_signal(kind)
        session.wait(60)
    assert before.wait_gone() == []

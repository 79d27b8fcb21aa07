"""Shared parts of the network tests: a lab of two namespaces, and a hook script that writes down what a client was
told.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from trio._core import _thread_cache

from tests.integration.net.lab import Lab, open_lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Two namespaces and a veth pair; the test is in the server's."""
    with open_lab(tmp_path) as opened:
        yield opened


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """A client script that writes its environment to env.REASON in the test's directory and sets the address."""
    script = tmp_path / "hook.sh"
    script.write_text(
        "#!/bin/sh\n"
        f'reason="${{1:-$reason}}"; env > {tmp_path}/env.$reason\n'
        'case "$reason" in\n'
        "  bound|renew) ip address replace $ip/$mask dev $interface ;;\n"
        "  BOUND|RENEW|REBOOT|REBIND) ip address replace $new_ip_address/$new_subnet_mask dev $interface ;;\n"
        "  deconfig|EXPIRE|FAIL|STOP|RELEASE) ip address flush dev $interface ;;\n"
        "esac\nexit 0\n"
    )
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module", autouse=True)
def no_thread_stays_in_a_lab() -> Iterator[None]:
    """Waits until trio's idle threads are gone (after half a second here instead of ten). Each is in the namespace
    where it was started, and the tests behind these must not get one of them.
    """
    kept: float = _thread_cache.IDLE_TIMEOUT
    vars(_thread_cache)["IDLE_TIMEOUT"] = 0.5
    yield
    vars(_thread_cache)["IDLE_TIMEOUT"] = kept
    deadline = time.monotonic() + 30
    while any(thread.name.startswith("Trio thread") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "trio's idle threads do not end"
        time.sleep(0.1)

"""`python -m rayos_net.dhcp`: one clear sentence for each mistake, and nothing left behind."""

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from rayos_net.dhcp.service import DhcpError
from tests.integration.net.lab import Lab
from tests.integration.net.serving import serving
from tests.integration.net.test_dhcp_load import server

pytestmark = pytest.mark.root
ROOT = Path(__file__).parents[3]


def serve(lab: Lab, *options: str) -> tuple[int, str]:
    """The exit status and what was said."""
    argv = [sys.executable, "-m", "rayos_net.dhcp", "--store", str(lab.directory / "l.db"), *options]
    done = subprocess.run(lab.in_server(argv), capture_output=True, text=True, cwd=ROOT, timeout=30)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--link", "nowhere", "--subnet", "10.77.0.1/16"], 1, "there is no link nowhere"),
        (["--link", "s0", "--subnet", "10.99.0.1/16"], 1, "the host has no address 10.99.0.1"),
        (
            ["--link", "s0", "--subnet", "10.77.0.0/16"],
            2,
            "server 10.77.0.0 is no host address in 10.77.0.0/16",
        ),
        (
            ["--link", "s0", "--subnet", "10.77.0.1/16", "--pool", "10.78.0.1-10.78.0.9"],
            2,
            "leaves 10.77.0.0/16",
        ),
        (
            ["--link", "s0", "--subnet", "10.77.0.1/16", "--lease-seconds", "1"],
            2,
            "lease of 1 s is outside 10..",
        ),
        (["--link", "s0", "--subnet", "10.77.0.1/16", "--store", "/proc/l.db"], 1, "lease file /proc/l.db"),
    ],
)
def test_a_mistake_is_one_sentence(lab: Lab, options: list[str], status: int, sentence: str) -> None:
    """The exit status tells a wrong option (2) from a failure (1); no traceback."""
    code, said = serve(lab, *options)
    assert code == status
    assert sentence in said
    assert said.startswith("rayos dhcp serve: ")
    assert said.count("\n") == 1


def test_a_second_server_on_the_same_leases_is_refused(lab: Lab) -> None:
    """Two servers would give one address twice."""
    with server(lab):
        options = ["--link", "s0", "--subnet", "10.77.0.1/16", "--store", str(lab.directory / "leases.db")]
        code, said = serve(lab, *options)
    assert code == 1
    assert "in use by another DHCP server" in said


async def test_the_service_says_that_its_link_was_removed(lab: Lab) -> None:
    """A bridge that disappears ends the server with the reason, not with silence."""
    with pytest.RaisesGroup(
        pytest.RaisesExc(DhcpError, match="the link was removed"), flatten_subgroups=True
    ):
        async with serving(lab):
            await trio.run_process(lab.in_server(["ip", "link", "delete", "s0"]))
            await trio.sleep(5)

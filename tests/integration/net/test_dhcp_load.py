"""Our DHCP server under load: killed in the middle of it, driven by perfdhcp, and stormed from one port."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from net.dhcp.binding import State
from net.dhcp.store import LeaseStore
from tests.integration.net.lab import Lab

pytestmark = pytest.mark.root
ROOT = Path(__file__).parents[3]
CLIENTS = 1000


@contextmanager
def server(lab: Lab, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`rayos dhcp serve` on the lab's link, as a process of its own."""
    argv = [sys.executable, "-m", "net.dhcp.service", "--link", lab.server_link, "--subnet", str(lab.address)]
    argv += ["--store", str(lab.directory / "leases.db"), "--pool", "10.77.1.0-10.77.250.255", "--quiet"]
    with subprocess.Popen([*argv, *more], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert "serving" in process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_no_acknowledged_lease_is_lost_when_the_server_is_killed(lab: Lab) -> None:
    """kill -9 in the middle of 1,000 clients: every lease whose ACK arrived is on disk, and the rest get
    theirs from the next server, nobody the address of another."""
    argv = lab.in_client([sys.executable, "-m", "tests.integration.net.load", "c0", str(CLIENTS), "30"])
    before: dict[str, int] = {}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT, bufsize=1) as load:
        assert load.stdout is not None
        with server(lab, "--no-limits") as process:
            for line in load.stdout:
                _, mac, ip = line.split()
                before[mac] = int(ip)
                if len(before) == CLIENTS // 3:
                    break
            process.kill()
            process.wait()
        os.set_blocking(load.stdout.fileno(), True)
        with server(lab, "--no-limits"):
            after = {line.split()[1]: int(line.split()[2]) for line in load.stdout}
        assert load.wait() == 0
    acknowledged = {**before, **after}
    assert len(acknowledged) == CLIENTS
    assert not set(before) & set(after)
    assert len(set(acknowledged.values())) == CLIENTS
    with LeaseStore(lab.directory / "leases.db") as store:
        stored = {one.mac: one.ip for one in store.read() if one.state is State.BOUND}
    assert stored == acknowledged


def test_perfdhcp_completes_a_thousand_exchanges_a_second(lab: Lab) -> None:
    """Kea's load tool, as a relay agent: at 1,000/s for two seconds nearly nothing is dropped."""
    lab.run(["ip", "address", "add", "10.77.0.2/16", "dev", "c0"])
    with server(lab, "--no-limits", "--relay", "10.77.0.0/16"):
        done = subprocess.run(
            lab.in_client(["perfdhcp", "-4", "-l", "c0", "-r", "1000", "-R", "1000", "-p", "2"]),
            capture_output=True,
            text=True,
            timeout=60,
        )
    rates = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("Rate:")]
    assert rates, done.stdout + done.stderr
    assert rates[0] > 900, done.stdout


def test_a_storm_leaves_other_ports_unharmed(lab: Lab, hook: Path) -> None:
    """While one hardware address floods the server, another client gets its lease at once."""
    flood = (
        "from net.dhcp import packet_socket; from tests.integration.net import load; import time\n"
        "sock = packet_socket.open_dhcp('c0', 68); print('up', flush=True); end = time.monotonic() + 20\n"
        "while time.monotonic() < end: load._send(sock, 5, load.MessageType.DISCOVER, {})\n"
    )
    udhcpc = ["busybox", "udhcpc", "-f", "-n", "-q", "-i", "c0", "-s", str(hook), "-t", "3", "-T", "3"]
    with (
        server(lab),
        subprocess.Popen(
            lab.in_client([sys.executable, "-c", flood]), stdout=subprocess.PIPE, text=True, cwd=ROOT
        ) as storm,
    ):
        try:
            assert storm.stdout is not None
            assert storm.stdout.readline() == "up\n"
            assert "obtained" in lab.run(udhcpc, timeout_s=12)
        finally:
            storm.kill()

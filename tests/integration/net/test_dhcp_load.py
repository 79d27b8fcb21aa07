"""Our DHCP server under load: killed in the middle of it, driven by perfdhcp, and stormed from one port."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayos_net.dhcp.binding import BindingState
from rayos_net.dhcp.store import LeaseStore
from tests.integration.net.lab import Lab

pytestmark = pytest.mark.root
ROOT = Path(__file__).parents[3]
CLIENTS = 1000


@contextmanager
def server(lab: Lab, *more: str, link: str = "") -> Iterator[subprocess.Popen[str]]:
    """`rayos dhcp serve` on the lab's link, as a process of its own."""
    argv = [
        sys.executable,
        "-m",
        "rayos_net.dhcp",
        "--link",
        link or lab.server_link,
        "--subnet",
        str(lab.address),
    ]
    argv += ["--store", str(lab.directory / "leases.db"), "--pool", "10.77.1.0-10.77.250.255", "--quiet"]
    with subprocess.Popen([*argv, *more], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert "serving" in process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_no_acknowledged_lease_is_lost_when_the_server_is_killed(lab: Lab) -> None:
    """A server is killed in the middle of 1,000 clients: every lease whose ACK arrived is on disk. The rest get
    theirs from the next server, nobody the address of another.
    """
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
        stored = {one.mac: one.ip for one in store.read() if one.state is BindingState.BOUND}
    assert stored == acknowledged


def test_perfdhcp_provisions_a_thousand_clients_behind_a_relay(lab: Lab) -> None:
    """Kea's load tool, as a relay agent with a thousand clients at once: each gets its lease, and it is on disk.
    Rates are `make bench-dhcp`'s.
    """
    lab.run(["ip", "address", "add", "10.77.0.2/16", "dev", "c0"])
    # One thread: it gives up when the host's clock steps back between two.
    load = ["perfdhcp", "-4", "-l", "c0", "-g", "single", "--scenario", "avalanche", "-R", str(CLIENTS)]
    with server(lab, "--no-limits", "--relay", "10.77.0.0/16"):
        done = subprocess.run(lab.in_client(load), capture_output=True, text=True, timeout=100)
    assert f"to provision {CLIENTS} clients" in done.stdout, done.stdout + done.stderr
    with LeaseStore(lab.directory / "leases.db") as store:
        assert sum(one.state is BindingState.BOUND for one in store.read()) == CLIENTS


def test_a_storm_of_forged_addresses_leaves_other_ports_unharmed(lab: Lab, hook: Path) -> None:
    """One port of the bridge floods with ever new hardware addresses, and a client on another port gets its lease at
    once. The flood is told by its port and holds four leases at most. The ports are isolated as guests' are: udhcpc
    reads every broadcast of its link, and would itself be flooded.
    """
    flood = (
        "import sys, time; from rayos_net.dhcp import packet_socket; from tests.integration.net import load\n"
        "sock = packet_socket.open_udp(sys.argv[1], 68); print('up', flush=True); end = time.monotonic() + 30\n"
        "while time.monotonic() < end: load._send(sock, time.monotonic_ns(), load.MessageType.DISCOVER, {})\n"
    )
    udhcpc = ["busybox", "udhcpc", "-f", "-n", "-q", "-i", "c0", "-s", str(hook), "-t", "3", "-T", "3"]
    with lab.host_with_address("10.77.200.1") as third, server(lab, link="br0") as process:
        for port in ("h0", lab.server_link):
            isolate = ["ip", "link", "set", port, "type", "bridge_slave", "isolated", "on"]
            subprocess.run(lab.in_server(isolate), check=True)
        storm_argv = ["nsenter", f"--net=/run/netns/{third}", sys.executable, "-c", flood, "h1"]
        with subprocess.Popen(storm_argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as storm:
            try:
                assert storm.stdout is not None
                assert storm.stdout.readline() == "up\n"
                time.sleep(1.0)
                assert "obtained" in lab.run(udhcpc, timeout_s=12)
            finally:
                storm.kill()
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        counters = json.loads(process.stdout.readline())["counters"]
    assert counters["drop_rate_limited"] > 100
    assert counters["ack"] == 1
    with LeaseStore(lab.directory / "leases.db") as store:
        assert [one.port for one in store.read()] == [lab.server_link]

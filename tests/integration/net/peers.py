"""Other people's programs beside ours, for a test's duration: a process that is read, and the three DHCP servers that
judge our client.
"""

import json
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.integration.net.lab import Lab

ROOT = Path(__file__).parents[3]
SERVERS = ("dnsmasq", "kea", "isc")


class Peer:
    """A running process, and all that it said so far on both streams."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.text = ""
        self._news = trio.Event()

    async def said(self, words: str, *, timeout_s: float = 30.0) -> None:
        """Wait until it has said this."""
        with trio.move_on_after(timeout_s):
            while words not in self.text:
                await self._news.wait()
            return
        raise AssertionError(f"not said within {timeout_s} s: {words!r}\n{self.text}")

    async def listen(self) -> None:
        """Read to the end."""
        assert self.process.stdout is not None
        async for piece in self.process.stdout:
            self.text += piece.decode(errors="replace")
            news, self._news = self._news, trio.Event()
            news.set()


@asynccontextmanager
async def running(argv: Sequence[str]) -> AsyncIterator[Peer]:
    """A process until the block ends, which kills it."""
    process = await trio.lowlevel.open_process(
        list(argv), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
    )
    peer = Peer(process)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.listen)
        try:
            yield peer
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()


@dataclass(frozen=True)
class Subnet:
    """A server's subnet: 10.77.0.0/16 from `first` to .1.250, itself the router, two name servers and NTP."""

    link: str = "s0"
    address: str = "10.77.0.1"
    first: str = "10.77.1.0"
    seconds: int = 3600
    t1: int | None = None  # with t2; dnsmasq has its own idea
    t2: int | None = None


@asynccontextmanager
async def dhcp_server(lab: Lab, name: str, subnet: Subnet, *, in_client: bool = False) -> AsyncIterator[Peer]:
    """One of SERVERS on the lab's server side (or client side), ready. Its leases outlive it in the directory."""
    start: dict[str, Callable[[Path, Subnet], tuple[list[str], str]]] = {
        "dnsmasq": _dnsmasq,
        "kea": _kea,
        "isc": _isc,
    }
    argv, ready = start[name](lab.directory, subnet)
    async with running(lab.in_client(argv) if in_client else lab.in_server(argv)) as peer:
        await peer.said(ready)
        yield peer


def _dnsmasq(directory: Path, subnet: Subnet) -> tuple[list[str], str]:
    argv = ["dnsmasq", "-k", "--conf-file=/dev/null", "--user=root", "--port=0", "--bind-interfaces"]
    argv += [f"--interface={subnet.link}", "--except-interface=lo", "--dhcp-authoritative", "--no-ping"]
    argv += [f"--dhcp-range={subnet.first},10.77.1.250,255.255.0.0,{subnet.seconds}", "--domain=up.example"]
    argv += [f"--dhcp-option=3,{subnet.address}", f"--dhcp-option=6,{subnet.address},10.77.0.99"]
    argv += ["--dhcp-option=42,10.77.0.5", f"--dhcp-leasefile={directory / 'dnsmasq.leases'}"]
    return [*argv, "--log-facility=-", "--log-dhcp"], "sockets bound exclusively"


def _kea(directory: Path, subnet: Subnet) -> tuple[list[str], str]:
    config: dict[str, Any] = {
        "interfaces-config": {"interfaces": [subnet.link], "dhcp-socket-type": "raw"},
        "lease-database": {"type": "memfile", "name": str(directory / "kea.csv"), "lfc-interval": 0},
        "valid-lifetime": subnet.seconds,
        "authoritative": True,
        "option-data": [
            {"name": "routers", "data": subnet.address},
            {"name": "domain-name-servers", "data": f"{subnet.address}, 10.77.0.99"},
            {"name": "domain-name", "data": "up.example"},
            {"name": "ntp-servers", "data": "10.77.0.5"},
        ],
        "subnet4": [{"subnet": "10.77.0.0/16", "pools": [{"pool": f"{subnet.first} - 10.77.1.250"}]}],
        "loggers": [{"name": "kea-dhcp4", "severity": "INFO", "output_options": [{"output": "stdout"}]}],
    }
    if subnet.t1 is not None:
        config |= {"renew-timer": subnet.t1, "rebind-timer": subnet.t2}
    (directory / "kea.json").write_text(json.dumps({"Dhcp4": config}))
    environment = [f"KEA_PIDFILE_DIR={directory}", f"KEA_LOCKFILE_DIR={directory}"]
    return ["env", *environment, "kea-dhcp4", "-c", str(directory / "kea.json")], "DHCP4_STARTED"


def _isc(directory: Path, subnet: Subnet) -> tuple[list[str], str]:
    times = ""
    if subnet.t1 is not None:
        times = f"option dhcp-renewal-time {subnet.t1};\noption dhcp-rebinding-time {subnet.t2};\n"
    (directory / "dhcpd.conf").write_text(
        f"authoritative;\nping-check off;\ndhcp-cache-threshold 0;\nddns-update-style none;\n{times}"
        f"default-lease-time {subnet.seconds};\nmin-lease-time {subnet.seconds};\nmax-lease-time {subnet.seconds};\n"
        f"subnet 10.77.0.0 netmask 255.255.0.0 {{\n  range {subnet.first} 10.77.1.250;\n"
        f"  option routers {subnet.address};\n  option domain-name-servers {subnet.address}, 10.77.0.99;\n"
        '  option domain-name "up.example";\n  option ntp-servers 10.77.0.5;\n}\n'
    )
    leases = directory / "dhcpd.leases"
    leases.touch()
    files = ["-cf", str(directory / "dhcpd.conf"), "-lf", str(leases), "-pf", str(directory / "dhcpd.pid")]
    return ["dhcpd", "-4", "-f", "-d", *files, subnet.link], "Server starting service"

"""A guest on a bridge with an uplink, whose address is somebody else's to give (dnsmasq's, in a namespace)."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from rayos_vmm.config.spec import Gpu, Net, VmSpec
from rayos_vmm.errors import Busy, Conflict
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.service.service import Service
from tests.integration.service_lab import bare, home, lab, running

pytestmark = [pytest.mark.guest, pytest.mark.root]
UPLINKED = "raytestup0"
GUEST = VmSpec(name="up", gpu=Gpu(enabled=False), tpm=False, net=Net(address="upstream", bridge=UPLINKED))


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def uplink(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """The bridge, its uplink, and dnsmasq at the other end; what reads its log."""
    far, log = f"rayup{uuid.uuid4().hex[:8]}", tmp_path / "dnsmasq.log"
    argv = ["ip", "netns", "exec", far, "dnsmasq", "-k", "--conf-file=/dev/null", "--user=root", "--port=0"]
    argv += [
        "--bind-interfaces",
        "--interface=u1",
        "--except-interface=lo",
        "--dhcp-authoritative",
        "--no-ping",
    ]
    argv += ["--dhcp-range=10.99.0.10,10.99.0.99,255.255.255.0,1h", "--dhcp-option=6,10.99.0.53"]
    argv += [
        f"--dhcp-leasefile={tmp_path / 'leases'}",
        "--domain=up.example",
        f"--log-facility={log}",
        "--log-dhcp",
    ]
    ip("netns", "add", far)
    try:
        ip("link", "add", UPLINKED, "type", "bridge", "forward_delay", "0")
        ip("link", "set", UPLINKED, "up")
        ip("link", "add", "u0", "master", UPLINKED, "type", "veth", "peer", "name", "u1", "netns", far)
        ip("link", "set", "u0", "up")
        ip("-n", far, "address", "add", "10.99.0.1/24", "dev", "u1")
        ip("-n", far, "link", "set", "u1", "up")
        with subprocess.Popen(argv) as process:
            try:
                yield log.read_text
            finally:
                process.kill()
    finally:
        ip("netns", "delete", far)
        ip("link", "delete", UPLINKED)


async def succeed(service: Service, command: str) -> str:
    """Returns the output of a command in the guest; it must end with status 0."""
    result = await service.guests.exec("up", command, 30)
    assert result.exit_status == 0, result
    return result.stdout.decode()


async def until(service: Service, kind: str, since: int | None) -> int:
    """Waits for an event of this kind; returns its number."""
    with trio.fail_after(30):
        async with aclosing(service.events(since)) as events:
            async for event in events:
                if event.type == kind:
                    return event.seq
    raise AssertionError(kind)


async def test_a_guest_has_an_upstream_address_and_keeps_it_over_the_service(
    uplink: Callable[[], str],
) -> None:
    """Acquired in its name before it boots, handed on, reachable, renewed on demand, adopted by the next service."""
    async with home() as paths:
        async with lab(paths, hardware=WorkerHardware(), network=True, keep=True) as service:
            with pytest.raises(Busy, match="there is no link nowhere"):
                wrong = VmSpec(name="up", net=Net(address="upstream", bridge="nowhere"))
                await service.machines.define(wrong)
                await service.machines.start("up")
            await service.machines.remove("up")
            await running(service, GUEST)
            view = await service.machines.get("up")
            assert view.address is not None and view.address.startswith("10.99.0.")
            assert f"inet {view.address}/24" in await succeed(service, "ip -4 address show eth0")
            resolv = (await succeed(service, "cat /etc/resolv.conf")).splitlines()
            assert resolv == ["search up.example", "nameserver 10.99.0.53"]
            await succeed(service, "ping -c 1 -W 5 10.99.0.1")
            listed = [one for one in await service.dhcp.leases() if one.state == "upstream"]
            assert [(one.address, one.mac) for one in listed] == [(view.address, view.mac)]
            number = await until(service, "upstream.acquired", 0)
            await service.dhcp.renew("up")
            await until(service, "upstream.acquired", number)
            kinds = [one.kind for one in (await service.dhcp.logs("up")).clients["up"]]
            assert kinds == ["DISCOVER", "REQUEST", "REQUEST"]
            await service.machines.define(bare())
            with pytest.raises(Conflict, match="svc has no lease of ours to renew"):
                await service.dhcp.renew("svc")
        async with lab(paths, hardware=WorkerHardware(), network=True) as service:
            await until(service, "upstream.acquired", 0)
            assert (await service.machines.get("up")).address == view.address
            status = (await service.dhcp.status()).upstream["up"]
            assert (status.state, status.address) == ("bound", f"{view.address}/24")
            # The guest renews with us what it believes to be the upstream server's.
            await succeed(service, "kill -USR1 $(pidof udhcpc)")
            await until(service, "dhcp.bound", 0)
            await service.machines.kill("up")
            await service.machines.remove("up")
            assert not list((paths.state / "upstream").iterdir())
    log = uplink()
    assert "client provides name: up" in log
    assert log.count("DHCPDISCOVER(u1)") == 1  # our client's; the guest's own stayed here

"""Rights of a real guest: what is taken away fails at once and by name, what is given works at once, until its end."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_network
from typing import Any

import msgspec
import pytest
import trio

from rayos_vmm.config.firewall import FirewallRule
from rayos_vmm.config.settings import ServiceConfig
from rayos_vmm.config.spec import Disk, VmSpec
from rayos_vmm.errors import Forbidden, RayosError, one_error
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.paths import Paths
from rayos_vmm.policy.constraint import Constraints
from rayos_vmm.service.service import Service, open_service
from tests.integration.service_lab import BRIDGE, home

pytestmark = [pytest.mark.guest, pytest.mark.root]

WRITE = "dd if=/dev/zero of=/dev/vda bs=4k count=4 oflag=direct 2>&1"
READ = "dd if=/dev/vda of=/dev/null bs=4k count=4 iflag=direct 2>&1"
DRAW = "dd if=/dev/urandom of=/dev/fb0 bs=4096 count=64 2>&1; sleep 0.3"
PING = "ping -c 1 -W 3 {}"
SPEC = VmSpec(name="svc", memory="128MiB", tpm=False, disks=[Disk(size="16MiB")])


@asynccontextmanager
async def whole(paths: Paths, *, keep: bool = False) -> AsyncIterator[Service]:
    """A service with its own devices; the guest ends with it unless it is to be kept."""
    async with open_service(ServiceConfig(network=True, bridge=BRIDGE), paths) as service:
        try:
            yield service
        except BaseException:  # a test that fails half way leaves no keeper
            keep = False
            raise
        finally:
            if not keep:
                with trio.CancelScope(shield=True), suppress(RayosError):
                    await service.machines.kill("svc")


async def run(service: Service, command: str) -> tuple[int, str]:
    result = await service.guests.exec("svc", command, 20)
    return result.exit_status, (result.stdout + result.stderr).decode()


async def denied(service: Service, device: str) -> int:
    return int((await service.guests.stats("svc"))[device]["denials"].get("capability", 0))


async def allotted(service: Service) -> tuple[int, int, int]:
    """Bytes of its disk's storage and of GPU memory, events that may wait."""
    stats = await service.guests.stats("svc")
    limits = {device: found["limits"] for device, found in stats.items()}
    return limits["disk0"]["storage"], limits["gpu"]["memory"], limits["keyboard"]["queue"]


async def applied(service: Service, revision: int) -> None:
    """Waits until the worker has said that it applied a revision."""
    broadcaster = service.revisions.broadcaster
    with trio.fail_after(20):
        while broadcaster.distribution.targets["svc"].applied < revision:
            await broadcaster.changed()


async def rules(service: Service, paths: Paths, ping: str) -> None:
    """A rule of a zone acts at once on a guest of it, its worker and the successor of that say so; a rollback too."""
    revisions = service.revisions
    await revisions.create_zone("lab")
    await revisions.assign("svc", "lab", None)
    rule = {"kind": "capability", "deny": ["CAP_NET"]}
    document: dict[str, Any] = {"zone": {"lab": {"rules": {"no-net": rule}}}, "vm": {"svc": {"zone": "lab"}}}
    revision = (await revisions.apply(document)).revision
    assert revision is not None
    assert (await run(service, ping))[0] != 0
    await applied(service, revision)
    keeper = KeeperClient(paths.vm_runtime("svc"))
    await keeper.kill_worker()
    assert (await run(service, ping))[0] != 0
    deny = {"kind": "firewall", "action": "deny", "direction": "out", "protocol": "icmp"}
    document["zone"]["lab"]["rules"] = {"no-ping": deny}
    answer = await revisions.apply(document)
    assert answer.lagging == [] and (await run(service, ping))[0] != 0
    first = service.firewall.rules("svc")[0]
    assert (first.origin, first.rule.name) == ("zone:lab", "no-ping")
    counts = await service.firewall.counts("svc")
    assert counts is not None and counts[0] >= 1
    caps = {"kind": "resource", "disk": "1MiB", "gpu_memory": "16MiB", "input_queue": 16}
    document["host"] = {"rules": {"small": caps}}
    before = await allotted(service)
    assert (await revisions.apply(document)).lagging == []
    assert await allotted(service) == (1 << 20, 16 << 20, 16) < before
    await keeper.kill_worker()
    assert await allotted(service) == (1 << 20, 16 << 20, 16)
    revision = (await revisions.rollback(2)).revision
    assert revision is not None
    await applied(service, revision)
    assert (await run(service, ping))[0] == 0 and await allotted(service) == before
    assert (await keeper.status())["restarts"] == 2
    keeper.close()
    (lab,) = revisions.scalability().zones
    assert (lab.zone, lab.rules, lab.vms, lab.lagging) == ("lab", 0, ["svc"], [])


async def constraints(service: Service, paths: Paths, host: str) -> None:
    """A card that may use one port, slowly and on the record: also by the worker's successor, until the grant ends."""
    policy = service.policy
    async with trio.open_nursery() as nursery:
        listeners = [listener for _ in range(2) for listener in await trio.open_tcp_listeners(0, host=host)]
        ports = [listener.socket.getsockname()[1] for listener in listeners]
        nursery.start_soon(trio.serve_listeners, greet, listeners)
        dial = f"nc -w 5 {host} %d < /dev/null"
        to_host = FirewallRule(name="host", action="allow", direction="out", protocol="tcp", to=host)
        await service.firewall.set_own("svc", [to_host])
        for port in ports:
            assert (await run(service, dial % port)) == (0, "hello")
        await policy.revoke_rights("svc", ["CAP_NET"])
        limits = Constraints(ports=((ports[0], ports[0]),), bandwidth=1_000_000, audit=True)
        granted = await policy.grant("svc", ["CAP_NET"], 600.0, "one port", limits)
        assert (await run(service, dial % ports[0])) == (0, "hello")
        assert (await run(service, dial % ports[1]))[0] != 0
        assert (await service.guests.stats("svc"))["net"]["quota"]["rate_bytes_per_second"] == 125_000
        keeper = KeeperClient(paths.vm_runtime("svc"))
        await keeper.kill_worker()
        keeper.close()
        assert (await run(service, dial % ports[1]))[0] != 0
        assert (await service.guests.stats("svc"))["net"]["quota"]["rate_bytes_per_second"] == 125_000
        await trio.sleep(1.2)  # a worker tells of use once a second
        await policy.audit.sync()
        used = [
            entry.data["operations"] for entry in policy.records(1000) if entry.data.get("device") == "net"
        ]
        assert any("net.tx" in operations for operations in used)
        await policy.revoke(granted.id)
        await policy.grant("svc", ["CAP_NET"], None, "all of it")
        disk = ["CAP_DISK_R", "CAP_DISK_W"]
        await policy.revoke_rights("svc", disk)
        one = await policy.grant("svc", disk, 600.0, "one at once", Constraints(concurrent=1))
        assert await service.revisions.broadcaster.wait_applied("svc", 20)
        read = "dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>&1 | grep -q '16+0 records in'"
        assert (await run(service, read))[0] == 0
        assert (await service.guests.stats("svc"))["disk0"]["quota"]["requests_at_once"] == 1
        await policy.revoke(one.id)
        await policy.grant("svc", disk, None, "all of it")
        assert await service.revisions.broadcaster.wait_applied("svc", 20)
        assert (await run(service, dial % ports[1])) == (0, "hello")
        assert (await service.guests.stats("svc"))["net"]["quota"]["rate_bytes_per_second"] > 1_000_000
        nursery.cancel_scope.cancel()


async def missing(service: Service) -> None:
    """Whatever needs a right that was taken says at once which, and how it is given; so does a command under way."""
    policy = service.policy

    async def refused(right: str, *asked: Callable[[], Awaitable[object]]) -> None:
        await policy.revoke_rights("svc", [right])
        for ask in asked:
            with trio.fail_after(1), pytest.raises(Forbidden, match=f"svc does not have {right}") as error:
                await ask()
            assert (error.value.code, error.value.hint) == ("capability_missing", f"rayos grant svc {right}")
        await policy.grant("svc", [right], None, "given back")

    agent = [
        lambda: service.guests.exec("svc", "true"),
        lambda: service.guests.read_file("svc", "/etc/passwd"),
        lambda: service.guests.write_file("svc", "/tmp/x", b"x"),
    ]
    await refused("CAP_CONSOLE_W", *agent)
    typed = [
        lambda: service.guests.console_write("svc", 0, b"x"),
        lambda: service.guests.console_resize("svc", 0, 80, 25),
    ]
    await refused("CAP_CONSOLE_R", *agent, *typed)
    await refused("CAP_INPUT", lambda: service.guests.input("svc").press("a"))
    await refused("CAP_GPU", lambda: service.guests.display("svc").screenshot())
    assert (await run(service, "echo again")) == (0, "again\n")
    with trio.fail_after(10), pytest.raises(Forbidden, match="svc does not have CAP_CONSOLE_W"):
        with one_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.guests.exec, "svc", "sleep 60")
                await trio.sleep(0.2)
                await policy.revoke_rights("svc", ["CAP_CONSOLE_W"])
    await policy.grant("svc", ["CAP_CONSOLE_W"], None, "given back")
    assert (await run(service, "echo again")) == (0, "again\n")


async def greet(stream: trio.SocketStream) -> None:
    async with stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(b"hello")


async def test_rights_act_on_a_running_guest_and_the_next_service_has_them() -> None:
    """Disk, network and GPU taken and given back; a grant ends by itself; the next service has grants and audit."""
    async with home() as paths:
        async with whole(paths, keep=True) as service:
            policy = service.policy
            host = str(next(ip_network((await service.info()).subnet or "", strict=False).hosts()))
            ping = PING.format(host)
            await service.machines.define(SPEC)
            await service.machines.start("svc")
            await service.machines.wait("svc", "ready", 60)
            assert (await run(service, WRITE))[0] == 0

            await policy.revoke_rights("svc", ["CAP_DISK_W"])
            status, said = await run(service, WRITE)
            assert status != 0 and "Input/output error" in said
            assert await denied(service, "disk0") >= 1
            assert (await run(service, READ))[0] == 0
            await policy.grant("svc", ["CAP_DISK_W"], 2.0, "a short while")
            end = trio.current_time() + 2.0
            assert (await run(service, WRITE))[0] == 0
            await trio.sleep_until(end + 0.05)
            assert (await run(service, WRITE))[0] != 0

            assert (await run(service, ping))[0] == 0
            await policy.revoke_rights("svc", ["CAP_NET"])
            assert (await run(service, ping))[0] != 0
            assert await denied(service, "net") >= 1
            await policy.grant("svc", ["CAP_NET"], None, "")
            assert (await run(service, ping))[0] == 0

            await rules(service, paths, ping)
            await constraints(service, paths, host)
            await missing(service)

            await policy.revoke_rights("svc", ["CAP_GPU"])
            await run(service, DRAW)
            assert await denied(service, "gpu") >= 1
            await policy.grant("svc", ["CAP_GPU"], 60.0, "for the next service")
            refused = await denied(service, "gpu")  # its console draws by itself
            await run(service, DRAW)
            assert await denied(service, "gpu") == refused
            await trio.sleep(1.2)  # a worker tells of refusals once a second
            operations = [entry.op.value for entry in policy.records(1000)]
            assert {"GRANT", "REVOKE", "EXPIRE", "CHECK_FAIL", "STATE", "DEFINE"} <= set(operations)
            before = policy.grants()
            records = (await policy.verify()).records

        async with whole(paths) as service:
            after = service.policy.grants()
            strip = [msgspec.structs.replace(grant, left_s=None) for grant in after]
            assert strip == [msgspec.structs.replace(grant, left_s=None) for grant in before]
            found = await service.policy.verify()
            assert found.ok and found.records >= records
            with paths.audit.open("r+b") as file:
                byte = os.pread(file.fileno(), 1, 500)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), 500)
                found = await service.policy.verify()
                os.pwrite(file.fileno(), byte, 500)
            assert not found.ok and found.offset <= 500

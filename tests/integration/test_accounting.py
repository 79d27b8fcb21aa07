"""A guest's accounts, limits and levels: figures move, a limit acts at once and outlives worker and service."""

from __future__ import annotations

from contextlib import aclosing

import msgspec
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from rayos_vmm.api.prometheus import serve_prometheus
from rayos_vmm.config.spec import Disk, Quota, VmSpec
from rayos_vmm.errors import Conflict, Invalid, NotFound
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.service.metrics import render
from rayos_vmm.service.service import Service
from tests.integration.service_lab import home, lab, running

pytestmark = [pytest.mark.guest, pytest.mark.root]

SPEC = VmSpec(name="svc", disks=[Disk(size="16MiB")], quota=Quota(disk_operations=100_000))
#: Write so many blocks, each on its own and past the guest's cache.
WRITE = "dd if=/dev/zero of=/dev/vda bs=4096 count={} oflag=direct 2>/dev/null"
#: The bridge has the first address of the guest's network; whether it answers does not matter.
PING = (
    r"ping -c 2 -W 1 $(ip -4 addr show eth0 | sed -n 's/.*inet \([0-9]*\.[0-9]*\.[0-9]*\)\..*/\1.1/p'); true"
)


async def succeed(service: Service, command: str) -> str:
    result = await service.guests.exec("svc", command, 60)
    assert result.exit_status == 0, result
    return result.stdout.decode()


def written(service: Service) -> int:
    (disk,) = [one for one in service.accounts.devices("svc") if one.device == "disk0"]
    count: int = disk.operations["disk.write"].allowed
    return count


async def test_accounts_limits_and_levels_of_a_running_guest() -> None:
    """Counters and kept operations follow the guest, and a limit shapes it while it runs. A worker that is killed
    leaves its counts and its limits to the next, a service too.
    """
    async with home() as paths:
        async with lab(paths, real=True, network=True, keep=True) as service:
            await running(service, SPEC)
            before = written(service)
            await succeed(service, WRITE.format(64))
            assert written(service) >= before + 64
            disk = service.accounts.device("svc", "disk0", 256)
            done = [one for one in disk.last if one.operation == "disk.write"]
            assert done and all(one.bytes and one.duration_ns and one.outcome == "done" for one in done)
            assert disk.profile["disk.write"]["perform"]["p50"] > 0
            assert {one.device for one in service.accounts.devices("svc")} == {
                *("disk0", "net", "gpu", "keyboard", "mouse", "tablet", "console", "rng")
            }

            # Of what the guest did with its screen and console, and we with its keyboard, all is timed.
            await service.guests.input("svc").press("a")
            for name, operation in (
                ("gpu", "gpu.render"),
                ("keyboard", "input.inject"),
                ("keyboard", "input.poll"),
                ("console", "console.write"),
            ):
                device = service.accounts.device("svc", name, 256)
                assert all(one.duration_ns for one in device.last)
                took = device.operations[operation].latency_ns
                assert 0 < took["p50"] <= took["p99"], operation

            # A denial is counted by its reason, and kept: the rights are taken from the running guest.
            await service.policy.revoke_rights("svc", ["CAP_DISK_W"])
            assert (await service.guests.exec("svc", WRITE.format(1), 60)).exit_status
            await service.policy.grant("svc", ["CAP_DISK_W"], None, "test")
            denied = service.accounts.device("svc", "disk0", 256)
            assert denied.denials["capability"] >= 1
            assert any(one.outcome == "capability" and one.bytes for one in denied.last)

            # A full quota is an I/O error to the guest, and an event that names machine and device.
            used = (await service.guests.stats("svc"))["disk0"]["quota"]["storage_bytes"]
            await service.accounts.set_limits("svc", "disk0", {"storage": used + 4096})
            more = "dd if=/dev/zero of=/dev/vda bs=4096 seek=2000 count=64 oflag=direct 2>/dev/null"
            assert (await service.guests.exec("svc", more, 60)).exit_status
            with trio.fail_after(10):
                async with aclosing(service.events(0)) as events:
                    async for event in events:
                        if event.type == "devices.disk_full":
                            break
            assert (event.vm, event.data["device"], event.data["why"]) == ("svc", "disk0", "quota")
            await service.accounts.set_limits("svc", "disk0", {"storage": 10 << 30})
            await succeed(service, more)

            # 20 requests a second: 40 take two seconds less what was saved up. The guest's clock is the judge.
            assert await service.accounts.set_limits("svc", "disk0", {"iops": 20}) == {
                "rate": 0,
                "iops": 20,
                "storage": 10 << 30,
            }
            timed = f"read a _ < /proc/uptime; {WRITE.format(40)}; read b _ < /proc/uptime; echo $a $b"
            first, last = map(float, (await succeed(service, timed)).split())
            assert last - first > 1.7
            with pytest.raises(NotFound):
                await service.accounts.set_limits("svc", "disk7", {"iops": 20})
            with pytest.raises(Invalid, match="disk0 has no limit queue"):
                await service.accounts.set_limits("svc", "disk0", {"queue": 64})
            with pytest.raises(Invalid, match="are allowed while the guest runs"):
                await service.accounts.set_limits("svc", "gpu", {"memory": 1 << 40})
            assert "memory" not in service.registry.all()[0].record.limits.get("gpu", {})
            await service.accounts.set_limits("svc", "net", {"rate": 1_250_000})
            await service.accounts.set_limits("svc", "console", {"rate": 1 << 20})
            await service.accounts.set_level("svc", 3)

            count = written(service)
            keeper = KeeperClient(paths.vm_runtime("svc"))
            async with trio.open_nursery() as nursery:
                restarted = trio.Event()

                async def watch() -> None:
                    async for event in service.events(service_events_before):
                        if event.type == "devices.worker_started" and event.data["restarts"] == 1:
                            restarted.set()

                service_events_before = 0
                nursery.start_soon(watch)
                await keeper.kill_worker()
                await restarted.wait()
                nursery.cancel_scope.cancel()
            keeper.close()
            stats = await service.guests.stats("svc")
            assert stats["disk0"]["limits"] == {"rate": 0, "iops": 20, "storage": 10 << 30}
            assert stats["net"]["limits"] == {"rate": 1_250_000}
            assert stats["console"]["limits"] == {"rate": 1 << 20}
            assert written(service) >= count  # nothing was forgotten
            assert service.accounts.metrics("svc", 512).level == 3
            first, last = map(float, (await succeed(service, timed)).split())
            assert last - first > 1.7

        async with lab(paths, real=True, network=True) as service:
            assert service.accounts.limits("svc", "disk0")["iops"] == 20
            assert written(service) >= count + 40
            assert (await service.guests.stats("svc"))["disk0"]["limits"]["iops"] == 20
            await service.accounts.set_limits("svc", "disk0", {"iops": 0})
            for level in range(4):
                assert await service.accounts.set_level("svc", level) == level
                await succeed(service, WRITE.format(32))
            samples = service.accounts.metrics("svc", 512).samples
            assert [one.number for one in samples] == sorted(one.number for one in samples)
            assert samples[-1].operations > samples[0].operations and samples[-1].cpu_ns > 0

            # Every frame was decided by one layer of the firewall; the shares say how many by which.
            await succeed(service, PING)  # this worker has judged frames of its own
            firewall = (await service.guests.stats("svc"))["net"]["firewall"]
            assert sum(firewall["hit_percent"].values()) == pytest.approx(100, abs=0.1)
            assert firewall["hit_percent"]["guard"] < 100

            text = (await render(service)).decode()
            for line in (
                'rayos_firewall_frames_total{layer="default",vm="svc"}',
                'rayos_firewall_hit_ratio{layer="cache",vm="svc"}',
                'rayos_device_operations_total{device="disk0",operation="disk.write",vm="svc"}',
                'rayos_device_latency_seconds_bucket{device="disk0",le="+Inf",operation="disk.write",vm="svc"}',
                'rayos_device_denials_total{device="disk0",reason="capability",vm="svc"}',
                'rayos_machines{state="running"} 1.0',
                'rayos_dhcp_leases{state="bound"}',
                "rayos_worker_deaths_total",
                "rayos_audit_lost_total 0.0",
            ):
                assert line in text
            async with trio.open_nursery() as nursery:
                port = await nursery.start(serve_prometheus, service, "127.0.0.1", 0)
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answer = b"".join([chunk async for chunk in stream])
                await stream.aclose()
                nursery.cancel_scope.cancel()
            assert answer.startswith(b"HTTP/1.1 200")
            families = {family.name for family in text_string_to_metric_families(text)}
            assert {"rayos_device_operations", "rayos_worker_cpu_seconds", "rayos_events"} <= families
            assert msgspec.json.encode(service.accounts.overview())
            await service.machines.kill("svc")
            with pytest.raises(Conflict):
                service.accounts.devices("svc")
            assert service.accounts.limits("svc", "net") == {"rate": 1_250_000}

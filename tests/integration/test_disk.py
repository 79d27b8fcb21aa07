"""The block device as the Linux driver sees it: each feature that is offered is used by a guest here."""

from __future__ import annotations

import pytest

from rayos_vmm.pytest_plugin import GuestFactory
from rayos_vmm.testing.daemon import PrivateDaemon
from rayos_vmm.testing.guest import Guest

pytestmark = [pytest.mark.guest, pytest.mark.root]


async def requests_of(guest: Guest, disk: str) -> list[int]:
    """Chains that each queue of a disk has had."""
    stats = await guest.stats()
    return [queue["requests"] for queue in stats[disk]["queues"]]


async def test_each_cpu_has_a_queue(guest_factory: GuestFactory, rayos_daemon: PrivateDaemon) -> None:
    """Two CPUs, two queues: what a CPU writes goes through its own, also when the worker is killed in between."""
    async with guest_factory(
        disk="64MiB", disks=[{"size": "8MiB", "queues": 1}], cpus=2, net={"enabled": False}, tpm=False
    ) as guest:
        assert (await guest.succeed("ls /sys/block/vda/mq")).split() == ["0", "1"]
        assert (await guest.succeed("ls /sys/block/vdb/mq")).split() == ["0"]
        for cpu in (0, 1):
            before = await requests_of(guest, "disk0")
            script = f"taskset {1 << cpu:x} dd if=/dev/urandom of=/dev/vda bs=64k count=16 seek={cpu * 16} oflag=direct"
            await guest.succeed(script + " 2>/dev/null")
            after = await requests_of(guest, "disk0")
            grown = [now - then for now, then in zip(after, before, strict=True)]
            assert grown[cpu] >= 16 > grown[1 - cpu], (cpu, grown)
            await guest.kill_worker()
        await guest.succeed("dd if=/dev/vda of=/tmp/read bs=64k count=32 iflag=direct 2>/dev/null")
        image = rayos_daemon.paths.vm_state(guest.name) / "disk-0.img"
        with image.open("rb") as file:
            assert await guest.read_file("/tmp/read") == file.read(2 << 20)

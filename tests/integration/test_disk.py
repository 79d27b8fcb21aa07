"""The block device as the Linux driver sees it: each feature that is offered is used by a guest here."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from rayos_devices.blk.wire import BlkFeature
from rayos_devices.virtio.features import TRANSPORT_FEATURES, Feature
from rayos_vmm.errors import Invalid, NotFound, RayosError
from rayos_vmm.testing.daemon import PrivateDaemon
from rayos_vmm.testing.guest import Guest
from rayos_vmm.testing.pytest_plugin import GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.root]


OFFERED = {*BlkFeature, *TRANSPORT_FEATURES} - {
    BlkFeature.RO,
    BlkFeature.MQ,
    Feature.PROTOCOL_FEATURES,  # between QEMU and us
    Feature.LOG_ALL,  # as well
    Feature.ANY_LAYOUT,  # legacy drivers' alone, as VERSION_1 says it
    Feature.NOTIFY_ON_EMPTY,
}


async def acknowledged(guest: Guest, disk: str) -> set[int]:
    """Feature bits that the driver took."""
    bits = (await guest.succeed(f"cat /sys/block/{disk}/device/features")).strip()
    return {1 << bit for bit, value in enumerate(bits) if value == "1"}


async def requests_of(guest: Guest, disk: str) -> list[int]:
    """Chains that each queue of a disk has had."""
    stats = await guest.stats()
    return [queue["requests"] for queue in stats[disk]["queues"]]


async def test_each_cpu_has_a_queue(guest_factory: GuestFactory, rayos_daemon: PrivateDaemon) -> None:
    """Two CPUs, two queues: what a CPU writes goes through its own, also when the worker is killed in between."""
    async with guest_factory(
        disk="64MiB", disks=[{"size": "8MiB", "queues": 1}], cpus=2, net={"enabled": False}, tpm=False
    ) as guest:
        assert await acknowledged(guest, "vda") == OFFERED | {BlkFeature.MQ}
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


async def test_a_driver_sees_and_uses_what_is_offered(
    guest_factory: GuestFactory, rayos_daemon: PrivateDaemon
) -> None:
    """Geometry, cache mode, discard, a new size, a reset, a killed worker: one guest sees it all, without an error."""
    async with guest_factory(
        disk="64MiB", gpu={"enabled": False}, net={"enabled": False}, tpm=False, quota={"disk": "96MiB"}
    ) as guest:
        image = rayos_daemon.paths.vm_state(guest.name) / "disk-0.img"
        queue = "/sys/block/vda/queue"
        limits = await guest.succeed(
            f"cd {queue}; cat logical_block_size physical_block_size minimum_io_size optimal_io_size max_segments "
            "discard_max_bytes write_zeroes_max_bytes; cat ../serial"
        )
        sizes = [512, 4096, 4096, 1 << 17, 126, 1 << 30, 1 << 30]
        assert limits.split() == [*map(str, sizes), "rayos-0"]
        assert await acknowledged(guest, "vda") == OFFERED
        assert (await guest.stats())["disk0"]["status"] == [
            "acknowledge",
            "driver",
            "driver_ok",
            "features_ok",
        ]

        # CONFIG_WCE: without a cache nobody needs to flush, and the mode survives the worker.
        async def flushes() -> int:
            operations = (await guest.stats())["disk0"]["operations"]
            return int(operations["disk.flush"]["allowed"])

        async def cache() -> str:
            stats = await guest.stats()
            return str(stats["disk0"]["cache"])

        write = "dd if=/dev/urandom of=/dev/vda bs=64k count=4 conv=fsync 2>/dev/null"
        before = await flushes()
        await guest.succeed(write)
        assert await flushes() > before and await cache() == "write back"
        await guest.succeed("echo 'write through' >/sys/block/vda/cache_type")
        assert await cache() == "write through"
        await guest.kill_worker()
        assert await cache() == "write through"
        before = await flushes()
        await guest.succeed(write)
        assert await flushes() == before
        await guest.succeed("echo 'write back' >/sys/block/vda/cache_type")
        assert await cache() == "write back"

        # Discard gives storage, and with it quota, back.
        def taken() -> int:
            return image.stat().st_blocks * 512

        await guest.succeed("dd if=/dev/urandom of=/dev/vda bs=1M count=32 conv=fsync 2>/dev/null")
        full = taken()
        assert full >= 32 << 20
        await guest.succeed("blkdiscard -o 0 -l 33554432 /dev/vda")
        assert full - taken() >= 32 << 20
        quota = (await guest.stats())["disk0"]["quota"]
        assert quota["storage_bytes"] == taken() and quota["limit_bytes"] == 96 << 20

        # A new size, told again by a successor that was asked in between; then by a worker that is killed.
        for size in (80, 96):
            view = await guest.client.resize_disk(guest.name, f"{size}MiB")
            assert view.size_bytes == size << 20
            await guest.wait_until_succeeds(f"[ $(blockdev --getsize64 /dev/vda) = {size << 20} ]")
            await guest.kill_worker()
        await guest.succeed("dd if=/dev/urandom of=/dev/vda bs=1M seek=95 count=1 conv=fsync 2>/dev/null")
        with pytest.raises(Invalid, match="it only grows"):
            await guest.client.resize_disk(guest.name, "64MiB")
        with pytest.raises(Invalid, match=r"quota\.disk"):
            await guest.client.resize_disk(guest.name, "128MiB")
        with pytest.raises(NotFound, match="no disk 1"):
            await guest.client.resize_disk(guest.name, "64MiB", disk=1)
        (view,) = await guest.client.disks(guest.name)
        assert (view.size_bytes, view.queues) == (96 << 20, 1)

        # The driver resets the device and begins again (RESET_DEVICE), also with a worker that knows it by hearsay.
        await guest.kill_worker()
        await guest.reset()
        await guest.client.wait(guest.name, "ready", timeout_s=90)
        await guest.kill_worker()
        await guest.succeed(write)
        assert "I/O error" not in await guest.succeed("dmesg")


def qemu_img(*arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], check=True)


def leftovers(what: str) -> list[str]:
    """Command lines of processes that have something to do with a file."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if what in line:
                lines.append(line)
    return lines


async def test_an_image_of_another_format_is_a_disk_like_any(
    guest_factory: GuestFactory, tmp_path: Path
) -> None:
    """qcow2: by qemu-img's word the guest's data is in it, with quota, discard and kills; its reader ends with it."""
    image, raw = tmp_path / "image.qcow2", tmp_path / "image.raw"
    qemu_img("create", "-q", "-f", "qcow2", str(image), "64M")
    disk = {"path": str(image), "format": "qcow2"}
    options = {"gpu": {"enabled": False}, "net": {"enabled": False}, "tpm": False, "quota": {"disk": "16MiB"}}
    async with guest_factory(disks=[disk], **options) as guest:
        assert (await guest.succeed("blockdev --getsize64 /dev/vda")).strip() == str(64 << 20)
        await guest.succeed("dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null")
        await guest.succeed("dd if=/tmp/data of=/dev/vda bs=64k seek=512 conv=fsync 2>/dev/null")
        await guest.kill_worker()
        await guest.succeed(
            "dd if=/dev/vda bs=64k skip=512 count=16 iflag=direct 2>/dev/null | cmp - /tmp/data"
        )
        (view,) = await guest.client.disks(guest.name)
        assert (view.format, view.path) == ("qcow2", str(image))
        assert image.stat().st_blocks * 512 >= 1 << 20

        quota = (await guest.stats())["disk0"]["quota"]
        assert quota["storage_bytes"] == image.stat().st_blocks * 512
        await guest.fail("dd if=/dev/urandom of=/dev/vda bs=1M count=32 oflag=direct 2>/dev/null")
        stats = (await guest.stats())["disk0"]
        assert stats["denials"]["quota"] > 0 and stats["quota"]["storage_bytes"] <= 16 << 20
        await guest.succeed("blkdiscard -o 0 -l $((32 << 20)) /dev/vda; sync")
        after = (await guest.stats())["disk0"]["quota"]["storage_bytes"]
        assert after < stats["quota"]["storage_bytes"] - (8 << 20)
        with pytest.raises(Invalid, match="qemu-img resize"):
            await guest.client.resize_disk(guest.name, "80MiB")
        data = await guest.read_file("/tmp/data")
    with trio.fail_after(20):
        while True:
            if not leftovers(str(image)):
                break
            await trio.sleep(0.05)
    qemu_img("check", "-q", str(image))
    qemu_img("convert", "-O", "raw", str(image), str(raw))
    with raw.open("rb") as file:
        file.seek(32 << 20)
        assert file.read(1 << 20) == data

    # Nothing beside the image is reached, and nothing is taken for what it is not.
    secret, thief = tmp_path / "secret", tmp_path / "thief.qcow2"
    secret.write_bytes(b"secret" * 1000)
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(thief))
    for path in (thief, secret):
        with pytest.raises(RayosError, match="cannot be read as qcow2"):
            async with guest_factory(disks=[{"path": str(path), "format": "qcow2"}], **options):
                pass
    assert not leftovers(str(tmp_path))

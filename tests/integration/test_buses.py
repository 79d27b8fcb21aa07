"""Disks on the buses that a kernel without virtio drivers knows: QEMU's controllers, and behind each our own store."""

from __future__ import annotations

import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rayos_images.cache import Cache
from rayos_vmm.config.fault import FaultRule
from rayos_vmm.config.load import to_spec
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.machine.line import SERIAL_PORT
from rayos_vmm.machine.view import ExitReason
from rayos_vmm.paths import Paths, default_paths
from rayos_vmm.service.service import Service
from tests.framework.kernel import build_bios_disk
from tests.integration.service_lab import expect, home, lab
from tests.integration.test_board import BARE
from tests.integration.tpm import uefi

pytestmark = [pytest.mark.guest, pytest.mark.root]

MIB = 1 << 20
BUSES = ("ahci", "ide", "nvme", "usb", "scsi", "virtio", "floppy")


def image(path: Path, tag: str, size_bytes: int = 4 * MIB) -> Path:
    path.write_bytes(build_bios_disk("drives", tag).ljust(size_bytes, b"\0"))
    return path


async def serve(service: Service, name: str, **table: object) -> None:
    await service.machines.define(to_spec(name, {**BARE, "firmware": "bios", **table}, prefix=name))
    await service.machines.start(name)
    await expect(service, "drives ", name=name, timeout_s=60)


async def finish(service: Service, paths: Paths, name: str) -> str:
    """Has the guest power itself off; what it has said."""
    await service.guests.console_write(name, SERIAL_PORT, b"x")
    await service.machines.wait(name, "stopped", 60)
    view = await service.machines.get(name)
    assert view.exit_reason is ExitReason.POWERED_OFF, view.reason
    return (paths.vm_state(name) / "serial.log").read_text()


async def test_a_disk_is_the_same_on_every_bus(tmp_path: Path) -> None:
    """The BIOS reads and writes each by the bus's own controller, and our worker accounts for it.

    Limits, faults and quota are those of a virtio disk. Images need not fill their last sector, a floppy not its
    medium. A copy of an image is written to and thrown away, and a second machine has its own at the same time.
    """
    images = {bus: image(tmp_path / f"{bus}.img", f"ON-{bus.upper()}") for bus in BUSES}
    images["floppy"].write_bytes(build_bios_disk("drives", "ON-FLOPPY")[:15000])
    images["nvme"].write_bytes(images["nvme"].read_bytes() + b"odd")
    images["virtio"].write_bytes(build_bios_disk("drives", "ON-VIRTIO")[:15001])
    golden = images["scsi"].read_bytes()
    disks: list[dict[str, Any]] = [{"path": str(path), "bus": bus} for bus, path in images.items()]
    disks[BUSES.index("scsi")]["snapshot"] = True
    disks[BUSES.index("usb")]["cache"] = "unsafe"
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await serve(service, "buses", disks=disks)
        await serve(service, "twin", disks=[disks[BUSES.index("scsi")]])
        rule = FaultRule(op="read", action="error", sector=1, count=1)
        await service.guests.set_faults("buses", f"disk{BUSES.index('nvme')}", [rule], 0)
        for name in ("buses", "twin"):
            await service.guests.console_write(name, SERIAL_PORT, b"g")
            await expect(service, "all visited", name=name, timeout_s=60)
        stats = await service.guests.stats("buses")
        said = await finish(service, paths, "buses")
        twin = await finish(service, paths, "twin")
        for index, bus in enumerate(BUSES):
            operations = stats[f"disk{index}"]["operations"]
            if bus == "nvme":
                assert operations["disk.read"]["denied"] == 1 and f"ON-{bus.upper()}" not in said
                continue
            assert f"read ON-{bus.upper()} write\n" in said, said
            assert operations["disk.read"]["allowed"] > 0 and operations["disk.write"]["allowed"] == 1, bus
            sector = images[bus].read_bytes()[1024:1536]
            assert sector.startswith(b"ON-" if bus != "scsi" else b"\0"), bus
        assert stats[f"disk{BUSES.index('usb')}"]["cache"] == "unsafe"
        assert images["scsi"].read_bytes() == golden and "read ON-SCSI write" in twin
        assert not list(paths.state.rglob("disk-*.img"))


async def test_what_was_acknowledged_survives_killed_workers(tmp_path: Path) -> None:
    """QEMU connects to each successor and asks again for what had no answer; the guest sees nothing of it."""
    disk = image(tmp_path / "ide.img", "ON-IDE", 64 * MIB)
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await serve(service, "killed", machine="pc", disks=[{"path": str(disk), "bus": "ide"}])
        await service.guests.console_write("killed", SERIAL_PORT, b"w")
        for number in (1, 2, 3):
            await expect(service, f"wrote {64 * number}\r\n", name="killed", timeout_s=60)
            with closing(KeeperClient(paths.vm_runtime("killed"))) as keeper:
                await keeper.kill_worker()
        await expect(service, "wrote 320\r\n", name="killed", timeout_s=60)
        await service.guests.console_write("killed", SERIAL_PORT, b"q")
        await expect(service, "in all ", name="killed")
        said = await finish(service, paths, "killed")
        assert "error" not in said
        count = int(said.partition("in all ")[2].split()[0])
        data = disk.read_bytes()[64 * 512 :]
        assert [struct.unpack_from("<I", data, 512 * one)[0] for one in range(count)] == list(range(count))


async def test_a_directory_is_a_disk_that_uefi_reads(tmp_path: Path) -> None:
    """Its shell runs the script that lies there; the directory itself is never written to."""
    folder = tmp_path / "esp"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "a file.txt").write_text("ON-FAT\r\n")
    script = 'FS0:\r\ntype "deep\\er\\a file.txt"\r\necho written > new.txt\r\ntype new.txt\r\nreset -s\r\n'
    (folder / "startup.nsh").write_text(script)
    firmware = uefi.build(Cache(default_paths().cache)).code
    disk = {"directory": str(folder), "bus": "ahci"}
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        table = {**BARE, "firmware": str(firmware), "disks": [disk], "memory": "128MiB"}
        await service.machines.define(to_spec("fat", table, prefix="fat"))
        await service.machines.start("fat")
        for text in ("ON-FAT", "written"):
            await expect(service, text, name="fat", timeout_s=120)
        await service.machines.wait("fat", "stopped", 60)
        assert (await service.machines.get("fat")).exit_reason is ExitReason.POWERED_OFF
        assert sorted(path.name for path in folder.iterdir()) == ["deep", "startup.nsh"]

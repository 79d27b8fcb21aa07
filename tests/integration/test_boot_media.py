"""A hobby OS on the media it ships on: a disk image and an ISO by SeaBIOS, UEFI by OVMF, over our own devices."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

import pytest

from rayos_images.cache import Cache
from rayos_tpm.protocol import TpmState
from rayos_vmm.config.load import resolve_paths
from rayos_vmm.config.spec import Disk, Net, VmSpec
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.paths import default_paths
from tests.integration.service_lab import expect, home, lab, traces
from tests.integration.tpm import uefi

pytestmark = [pytest.mark.guest, pytest.mark.root]

SECTOR: Final = 2048  # of an ISO


def real_mode(text: str) -> bytes:
    """Code for a BIOS's boot sector that says `text` on the first serial port and halts."""
    # xor ax,ax; mov ds,ax; mov dx,3f8h; mov si,7c00h+17; cld; next: lodsb; test al,al; jz halt; out dx,al; jmp next;
    # halt: hlt; jmp halt
    start = bytes.fromhex("31c08ed8 baf803 be0000 fc ac84c07403eeebf8 f4ebfd")
    return (
        start.replace(b"\xbe\0\0", b"\xbe" + struct.pack("<H", 0x7C00 + len(start))) + text.encode() + b"\0"
    )


def iso(code: bytes) -> bytes:
    """An image with nothing but an El Torito boot record without emulation (El Torito 1.0; ECMA-119, 8)."""
    record = bytes([0]) + b"CD001\1" + b"EL TORITO SPECIFICATION".ljust(64, b"\0") + struct.pack("<I", 19)
    primary, end = bytes([1]) + b"CD001\1", bytes([255]) + b"CD001\1"
    validation = struct.pack("<BBH24sHBB", 1, 0, 0, b"rayos", 0, 0x55, 0xAA)
    checksum = -sum(struct.unpack("<16H", validation)) & 0xFFFF
    validation = validation[:28] + struct.pack("<H", checksum) + validation[30:]
    entry = struct.pack("<BBHBBHI20s", 0x88, 0, 0, 0, 0, 4, 20, b"")
    sectors = [*[b""] * 16, primary, record, end, validation + entry, code]
    return b"".join(sector.ljust(SECTOR, b"\0") for sector in sectors).ljust(64 * SECTOR, b"\0")


async def test_an_iso_and_a_disk_boot_by_bios_and_a_firmware_by_uefi(tmp_path: Path) -> None:
    """Each says its word on the serial line. The disk that SeaBIOS reads is our block device; the TPM has measured
    all of it, for UEFI in the host's own register.
    """
    cdrom, disk = tmp_path / "os.iso", tmp_path / "os.img"
    cdrom.write_bytes(iso(real_mode("FROM-ISO")))
    disk.write_bytes(real_mode("FROM-DISK").ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    found = uefi.build(Cache(default_paths().cache))
    machines = {
        "FROM-ISO": VmSpec(name="iso", cdrom=str(cdrom), net=Net(enabled=False)),
        "FROM-DISK": VmSpec(name="disk", disks=[Disk(path=str(disk))], net=Net(enabled=False)),
        "UEFI Interactive Shell": VmSpec(name="uefi", firmware=str(found.code), net=Net(enabled=False)),
    }
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        before = traces(paths)
        for word, spec in machines.items():
            await service.machines.define(resolve_paths(spec, tmp_path))
            await service.machines.start(spec.name)
            await expect(service, word, name=spec.name, timeout_s=120)
            assert (await service.guests.display(spec.name).screenshot()).startswith(b"\x89PNG")
            status = await service.guests.tpm(spec.name).status()
            expected = "host-reserved" if spec.firmware else "seed"
            assert (status.state, status.profile) == (TpmState.MEASURED, expected)
            if spec.disks:
                read = (await service.guests.stats(spec.name))["disk0"]["operations"]["disk.read"]
                assert read["allowed"] > 0
            await service.machines.kill(spec.name)
        assert traces(paths) == before

"""The controllers by which a guest without a virtio-blk driver reaches its disks, as QEMU's arguments.

The controller is QEMU's; each read and write of it comes to our worker over NBD (`rayos_devices.blk.nbd`). An error is
the guest's to see (`rerror`, `werror`), as on our own device, and QEMU waits for a worker that is replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from rayos_vmm.config.spec import Disk, VmSpec

#: Seconds that requests wait for the next worker; the keeper starts it within milliseconds.
RECONNECT_S: Final = 60
_OPEN_S: Final = 30
#: Their place in the boot order is the controller's, or the board's.
_NO_BOOTINDEX: Final = ("floppy", "sd")


def _quote(path: Path) -> str:
    return str(path).replace(",", ",,")


def node_arguments(index: int, disk: Disk, path: Path) -> list[str]:
    """The block node of a disk, whose bytes are behind the socket at `path`."""
    options = [
        f"driver=nbd,node-name=disk{index},read-only={'on' if disk.read_only else 'off'},discard=unmap",
        f"server.type=unix,server.path={_quote(path)}",
        f"reconnect-delay={RECONNECT_S},open-timeout={_OPEN_S}",
    ]
    return ["-blockdev", ",".join(options)]


def needs_usb(spec: VmSpec) -> bool:
    """Whether a disk or a keyboard hangs on USB."""
    return bool(spec.input.usb) or any(disk.bus == "usb" for disk in spec.disks)


def _controllers(spec: VmSpec) -> Iterable[str]:
    buses = {disk.bus for disk in spec.disks}
    if "ide" in buses and spec.machine == "q35":
        yield "piix3-ide,id=pata"
    if "ahci" in buses and spec.machine != "q35":
        yield "ich9-ahci,id=ahci"
    if "scsi" in buses:
        yield "virtio-scsi-pci,id=scsi"
    if "floppy" in buses and spec.machine == "q35":
        yield "isa-fdc"
    for index, disk in enumerate(spec.disks):
        if disk.bus == "sd":
            yield f"sdhci-pci,id=sd{index}"


def _place(spec: VmSpec, disk: Disk, position: int) -> str:
    """The device of the `position`-th disk of its bus, and where on the bus it is."""
    match disk.bus:
        case "ahci":
            # The CD is where a PC's second channel begins.
            port = position if position < 2 else position + 1
            return f"ide-hd,bus={'ide' if spec.machine == 'q35' else 'ahci'}.{port}"
        case "ide":
            slot = position if position < 2 else position + 1
            return f"ide-hd,bus={'pata' if spec.machine == 'q35' else 'ide'}.{slot // 2},unit={slot % 2}"
        case "nvme":
            return "nvme"
        case "usb":
            return "usb-storage,bus=usb.0"
        case "scsi":
            return f"scsi-hd,bus=scsi.0,scsi-id={position}"
        case "floppy":
            return f"floppy,unit={position}"
        case _:
            return "sd-card"


def disk_arguments(spec: VmSpec, paths: Sequence[Path]) -> list[str]:
    """The arguments of all disks that are not virtio's; `paths` are the sockets of every disk of the machine."""
    arguments: list[str] = []
    for controller in _controllers(spec):
        arguments += ["-device", controller]
    positions: Counter[str] = Counter()
    for index, (disk, path) in enumerate(zip(spec.disks, paths, strict=True)):
        if disk.bus == "virtio":
            continue
        arguments += node_arguments(index, disk, path)
        device = f"{_place(spec, disk, positions[disk.bus])},drive=disk{index}"
        positions[disk.bus] += 1
        if disk.bus in _NO_BOOTINDEX:
            boot = f"isa-fdc.bootindex{'AB'[positions['floppy'] - 1]}={index + 1}"
            arguments += ["-global", boot] if disk.bus == "floppy" else []
        else:
            device += f",bootindex={index + 1},serial={spec.disk_serial(index)}"
        if disk.logical_block_size != Disk().logical_block_size:
            device += f",logical_block_size={disk.logical_block_size}"
            device += f",physical_block_size={disk.logical_block_size}"
        if disk.bus not in ("nvme", "floppy", "sd"):
            device += ",rerror=report,werror=report"
        arguments += ["-device", device]
    return arguments

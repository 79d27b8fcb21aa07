"""Drives of a QEMU command line as disks of ours: each with its device, on the bus where the guest looks for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

from rayos_vmm.config.spec import DiskFormat
from rayos_vmm.dropin.command_line import Option, properties
from rayos_vmm.dropin.plan import Fate, Plan
from rayos_vmm.errors import Invalid

#: The device of a drive without `-drive if=none`: the bus of its disk.
_INTERFACES: Final = {"virtio": "virtio", "scsi": "scsi", "floppy": "floppy", "sd": "sd", "none": ""}
_DEVICES: Final = {
    "virtio-blk": "virtio",
    "vhost-user-blk": "virtio",
    "ide-hd": "ahci",
    "ide-drive": "ahci",
    "nvme": "nvme",
    "nvme-ns": "nvme",
    "usb-storage": "usb",
    "usb-uas": "usb",
    "scsi-hd": "scsi",
    "scsi-disk": "scsi",
    "floppy": "floppy",
    "sd-card": "sd",
}
_CDROMS: Final = ("ide-cd", "scsi-cd")
#: Controllers that a machine of ours has where a disk needs one.
_CONTROLLERS: Final = frozenset(
    {
        *(
            "ahci",
            "ich9-ahci",
            "piix3-ide",
            "piix4-ide",
            "ide",
            "nvme-subsys",
            "virtio-scsi",
            "virtio-scsi-pci",
        ),
        *("pvscsi", "lsi", "lsi53c895a", "sdhci-pci", "isa-fdc"),
    }
)
_WORDS: Final = ("hda", "hdb", "hdc", "hdd", "fda", "fdb", "cdrom", "sd", "pflash", "drive", "blockdev")
_MAGIC: Final = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdx": "vhdx"}


def is_drive(name: str) -> bool:
    """True for an option that brings a drive."""
    return name in _WORDS


def drive(option: Option) -> dict[str, str]:
    """A drive's properties: `file`, `if`, `format`, `id`, `media`, and others of QEMU's."""
    match option.name:
        case "drive":
            return properties(option.value)
        case "blockdev":
            return _blockdev(option)
        case "cdrom":
            return {"file": option.value, "media": "cdrom"}
        case "fda" | "fdb":
            return {"file": option.value, "if": "floppy"}
        case "sd" | "pflash":
            return {"file": option.value, "if": option.name}
    return {"file": option.value, "if": "ide"}


def _blockdev(option: Option) -> dict[str, str]:
    given = properties(option.value)
    path = given.get("filename") or given.get("file.filename")
    found = {"if": "none", "id": given.get("node-name", "")}
    if path:
        found["file"] = path
    else:
        found["over"] = given.get("file", "")
    if given.get("driver") in get_args(DiskFormat):
        found["format"] = given["driver"]
    if given.get("read-only") == "on":
        found["readonly"] = "on"
    return found


def _format(option: Option, given: dict[str, str], path: str) -> str:
    if "format" in given:
        if given["format"] not in get_args(DiskFormat):
            raise Invalid(
                f"{option}: format {given['format']!r}; allowed are {', '.join(get_args(DiskFormat))}"
            )
        return given["format"]
    suffix = Path(path).suffix.lstrip(".")
    if suffix in get_args(DiskFormat):
        return suffix
    try:
        with Path(path).open("rb") as file:
            seen = _MAGIC.get(file.read(4))
    except OSError:
        return "raw"
    if seen is not None:
        raise Invalid(
            f"{option}: refused: {path} looks like {seen}, and no format is given", hint=f"add format={seen}"
        )
    return "raw"


def place(
    plan: Plan,
    drives: Sequence[tuple[Option, dict[str, str]]],
    devices: list[tuple[Option, dict[str, str]]],
    *,
    is_snapshot: bool,
) -> None:
    """Puts every drive into the plan's table; takes the devices that belong to one off `devices`.

    Raises:
        Invalid: a drive cannot be a disk of ours.
    """
    used = _devices_of_drives(devices)
    below = {given["id"]: given for _, given in drives if given.get("id") and "file" in given}
    over = {given["over"] for _, given in drives if given.get("over")}
    disks: list[dict[str, Any]] = []
    # Of an interface, drives with an index are in its order, wherever they stand.
    for option, given in sorted(drives, key=lambda one: int(one[1].get("index", 0))):
        if given.get("id") in over:
            plan.say(option, Fate.OURS, "the file of the block device above it")
            continue
        if given.get("over"):
            given = {**below.get(given["over"], {}), **given}
        interface, path = given.get("if", "ide"), given.get("file", "")
        device = used.get(given.get("id", ""))
        if interface == "pflash":
            _flash(plan, option, path)
        elif given.get("media") == "cdrom" or (device is not None and device[1]["driver"] in _CDROMS):
            plan.table["cdrom"] = path
            plan.say(option, Fate.OURS, f"cdrom = {path!r}")
        elif not path:
            plan.say(option, Fate.NOTED, "an empty drive")
        else:
            bus = _bus(plan, option, interface, device)
            disks.append(_disk(option, given, path, bus, is_snapshot=is_snapshot))
            plan.say(
                option,
                Fate.OURS,
                f"a disk on {bus}" + (" of a FAT folder" if "directory" in disks[-1] else ""),
            )
        if device is not None:
            plan.say(device[0], Fate.OURS, "the device of that drive")
    if disks:
        plan.table["disks"] = disks
    for index in reversed(range(len(devices))):
        option, given = devices[index]
        stem = given.get("driver", "").removesuffix("-pci")
        if given.get("drive"):
            del devices[index]
        elif stem in _CONTROLLERS or given.get("driver") in _CONTROLLERS:
            plan.say(option, Fate.OURS, "a disk brings its controller along")
            del devices[index]


def _devices_of_drives(
    devices: Sequence[tuple[Option, dict[str, str]]],
) -> dict[str, tuple[Option, dict[str, str]]]:
    return {given["drive"]: (option, given) for option, given in devices if given.get("drive")}


def _bus(plan: Plan, option: Option, interface: str, device: tuple[Option, dict[str, str]] | None) -> str:
    is_q35 = plan.table["machine"] == "q35"
    if device is None:
        if interface == "none":
            raise Invalid(f"{option}: no -device has this drive")
        return _INTERFACES.get(interface) or ("ahci" if is_q35 else "ide")
    driver = device[1]["driver"]
    for tail in ("-non-transitional", "-transitional", "-pci", "-device"):
        driver = driver.removesuffix(tail)
    bus = _DEVICES.get(driver)
    if bus is None:
        raise Invalid(f"{device[0]}: refused: a disk of ours cannot be on {driver!r}")
    on_ahci = is_q35 or "ahci" in device[1].get("bus", "") or device[1].get("bus", "").startswith("sata")
    return "ide" if bus == "ahci" and not on_ahci else bus


def _disk(option: Option, given: dict[str, str], path: str, bus: str, *, is_snapshot: bool) -> dict[str, Any]:
    disk: dict[str, Any] = {"bus": bus}
    if path.startswith("fat:"):
        words = path.removeprefix("fat:").split(":")
        disk["directory"] = words[-1]
        return disk
    disk |= {"path": path, "format": _format(option, given, path)}
    if given.get("readonly", given.get("read-only")) == "on":
        disk["read_only"] = True
    if is_snapshot or given.get("snapshot") == "on":
        disk["snapshot"] = True
    if given.get("cache") == "unsafe":
        disk["cache"] = "unsafe"
    if given.get("serial"):
        disk["serial"] = given["serial"]
    return disk


def _flash(plan: Plan, option: Option, path: str) -> None:
    if "firmware" not in plan.table:
        plan.table["firmware"] = path
        plan.say(option, Fate.OURS, f"firmware = {path!r}")
    else:
        plan.say(option, Fate.NOTED, "a machine has a copy of its own of the variables beside its firmware")

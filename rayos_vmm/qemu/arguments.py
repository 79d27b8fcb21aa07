"""QEMU's command line as a pure function of what is asked for.

Invariants: no default device, no user configuration, no network of QEMU's own, the seccomp sandbox on. The
guest's memory is a sealed, shared memfd because the devices live in another process (vhost-user
specification, "Front-end message types", VHOST_USER_SET_MEM_TABLE). QEMU starts stopped (`-S`), so that
nothing that it says over QMP is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rayos_devices.kinds import KINDS
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.qemu.arch import architecture_of, board_of
from rayos_vmm.qemu.boot import Boot, FirmwareKind
from rayos_vmm.qemu.buses import disk_arguments, needs_usb
from rayos_vmm.qemu.cards import card_arguments, feature_words
from rayos_vmm.qemu.ports import port_arguments
from rayos_vmm.shared.devices import devices_of

SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class Sockets:
    """Where QEMU finds its sockets."""

    qmp_fd: int  # listening sockets that QEMU inherits
    line_fds: tuple[int, ...]  # of each of `spec.ports.lines`
    devices: Mapping[str, Path] = field(default_factory=dict)  # the vhost-user devices, by name
    console_ports: tuple[Path, ...] = ()  # the fallback: one plain socket for each port


def _quote(path: Path) -> str:
    """A path inside a QEMU option: a comma is doubled."""
    return str(path).replace(",", ",,")


def processor(spec: VmSpec, accelerator: str) -> str:
    """The model and features of the machine's processors."""
    if spec.cpu is not None:
        return spec.cpu
    if accelerator == "kvm":
        return "host"
    architecture = architecture_of(spec)
    fitting = architecture.our_cpu if spec.is_our_guest else architecture.foreign_cpu
    return board_of(spec).cpu or fitting


def _chipset(spec: VmSpec, boot: Boot) -> str:
    """The options for the parts of the board that are there without being asked for."""
    board = board_of(spec)
    with_drive, without_drive = board.cdrom_option
    has_drive = boot.cdrom is not None or any(disk.bus == "ahci" for disk in spec.disks)
    return ",".join(filter(None, (board.options, with_drive if has_drive else without_drive)))


def _clock(spec: VmSpec) -> list[str]:
    """The arguments that make runs alike: the clock's start, its pace, QEMU's random numbers."""
    arguments = ["-rtc", f"base={spec.rtc}{'' if spec.icount is None else ',clock=vm'}"]
    if spec.icount is not None:
        arguments += ["-icount", f"shift={spec.icount}"]
    if spec.seed is not None:
        arguments += ["-seed", str(spec.seed)]
    return arguments


def _machine(spec: VmSpec, accelerator: str, boot: Boot) -> list[str]:
    size_bytes = spec.memory_bytes
    pflash = "".join(
        f",pflash{unit}=flash{unit}" for unit, _ in enumerate(_flash(boot)) if boot.firmware_kind is not None
    )
    firmware = architecture_of(spec).firmware
    if pflash and firmware.flash_option:
        pflash += "," + firmware.flash_option.format(maximum_bytes=firmware.maximum_bytes)
    return [
        "-name",
        f"guest={spec.name},debug-threads=on",
        "-machine",
        f"{spec.machine},accel={accelerator},memory-backend=ram,{_chipset(spec, boot)}{pflash}",
        "-cpu",
        processor(spec, accelerator),
        "-smp",
        str(spec.cpus),
        "-m",
        f"size={size_bytes >> 20}M",
        "-object",
        f"memory-backend-memfd,id=ram,size={size_bytes},share=on,seal=on,dump=off",
        *_clock(spec),
    ]


def _flash(boot: Boot) -> list[tuple[Path, bool]]:
    """The flash images (file, read only), lowest unit first."""
    if boot.firmware is None or boot.firmware_kind is not FirmwareKind.PFLASH:
        return []
    flash = [(boot.firmware, True)]
    if boot.firmware_variables is not None:
        flash.append((boot.firmware_variables, False))
    return flash


def _boot(spec: VmSpec, boot: Boot) -> list[str]:
    arguments: list[str] = []
    for unit, (path, is_read_only) in enumerate(_flash(boot)):
        arguments += [
            "-blockdev",
            f"driver=raw,node-name=flash{unit},read-only={'on' if is_read_only else 'off'},"
            f"file.driver=file,file.filename={_quote(path)}",
        ]
    if boot.firmware is not None and boot.firmware_kind is FirmwareKind.BIOS:
        arguments += ["-bios", str(boot.firmware)]
    if boot.kernel is not None:
        arguments += ["-kernel", str(boot.kernel)]
        if boot.initrd is not None:
            arguments += ["-initrd", str(boot.initrd)]
        if boot.modules:
            arguments += ["-initrd", ",".join(module.option() for module in boot.modules)]
        if boot.append:
            arguments += ["-append", boot.append]
    if boot.cdrom is not None:
        arguments += [
            "-blockdev",
            f"driver=raw,node-name=cd0,read-only=on,file.driver=file,file.filename={_quote(boot.cdrom)}",
            "-device",
            board_of(spec).cdrom or architecture_of(spec).cdrom,
        ]
    return arguments


def _port_devices(paths: Sequence[Path], names: Sequence[str], *, has_reconnect_ms: bool) -> list[str]:
    """QEMU's own console, whose ports are ours."""
    if not paths:
        return []
    arguments = ["-device", f"virtio-serial-pci,id=console,max_ports={len(names)}"]
    for port, path in enumerate(paths):
        kind = "virtconsole" if port == 0 else "virtserialport"
        # QEMU is the client: it comes back when the worker was replaced.
        again = "reconnect-ms=100" if has_reconnect_ms else "reconnect=1"
        arguments += ["-chardev", f"socket,id=port{port},path={_quote(path)},{again}"]
        arguments += ["-device", f"{kind},chardev=port{port},nr={port},name={names[port]}"]
    return arguments


def _facts(spec: VmSpec, name: str, boot: Boot, mac: str) -> dict[str, object]:
    """The values for the fields in a kind's `QemuDevice`, of one device."""
    kind = devices_of(spec)[name]
    if kind == "blk":
        index = int(name.removeprefix("disk"))
        return {"queues": spec.disk_queues(spec.disks[index]), "bootindex": index + 1}
    if kind == "net":
        pairs = spec.net.queues
        # A vector for each queue, the configuration and the control queue.
        multiqueue = f",mq=on,vectors={2 * pairs + 2}" if pairs > 1 else ""
        return {"mac": mac, "mtu": spec.net.mtu, "queues": pairs, "multiqueue": multiqueue}
    if kind == "gpu":
        vga = architecture_of(spec).vga if boot.needs_vga else None
        size = {"width": spec.gpu.width, "height": spec.gpu.height}
        return {"gpu": vga or "vhost-user-gpu-pci", "scanouts": spec.gpu.scanouts, **size}
    # VIRTIO 1.3, 5.3.2: a pair for port 0 of a console, a control pair, and a pair for every further port.
    return {"num_vqs": 2 + 2 * len(spec.console_ports)}


def _device(spec: VmSpec, name: str, path: Path, facts: Mapping[str, object]) -> list[str]:
    qemu = KINDS[devices_of(spec)[name]].qemu
    arguments = ["-chardev", f"socket,id={name},path={_quote(path)}"]
    link = f"chardev={name}"
    if qemu.netdev:
        arguments += [
            "-netdev",
            f"vhost-user,id={qemu.netdev},{link},{qemu.netdev_properties}".format(**facts),
        ]
        link = f"netdev={qemu.netdev}"
    features = feature_words(spec.net) if qemu.netdev else ""
    words = (qemu.type, link, qemu.properties, "packed=on" if spec.packed else "", features)
    return [*arguments, "-device", ",".join(word.format(**facts) for word in words if word)]


def _display(spec: VmSpec) -> list[str]:
    """A display of QEMU's."""
    if not spec.gpu.enabled or spec.gpu.is_ours:
        return []
    size = f",xres={spec.gpu.width},yres={spec.gpu.height}"
    models = {"std": f"VGA{size}", "bochs": f"bochs-display{size}", "ramfb": "ramfb"}
    return ["-device", models.get(spec.gpu.model, f"{spec.gpu.model}{size}")]


def _devices(spec: VmSpec, boot: Boot, sockets: Sockets, mac: str, *, has_reconnect_ms: bool) -> list[str]:
    kinds = devices_of(spec)
    disks = {name: path for name, path in sockets.devices.items() if kinds[name] == "blk"}
    on_virtio = [name for name, disk in zip(disks, spec.disks, strict=False) if disk.bus == "virtio"]
    is_emulated = spec.net.model != "virtio"
    cards = [name for name in sockets.devices if kinds[name] == "net" and is_emulated]
    has_pci = "virtio" in board_of(spec).buses
    others = [name for name in sockets.devices if name not in disks and name not in cards and has_pci]

    def of_ours(names: Iterable[str]) -> list[str]:
        return [
            word
            for name in names
            for word in _device(spec, name, sockets.devices[name], _facts(spec, name, boot, mac))
        ]

    arguments = [*of_ours(on_virtio), *disk_arguments(spec, list(disks.values()))]
    for name in cards:
        path = sockets.devices[name]
        arguments += card_arguments(spec.net, path, mac, has_reconnect_ms=has_reconnect_ms)
    arguments += _display(spec) + of_ours(others)
    return arguments + _port_devices(
        sockets.console_ports, spec.console_ports, has_reconnect_ms=has_reconnect_ms
    )


def ends_at_reset(spec: VmSpec) -> bool:
    """Whether QEMU itself ends at the guest's reset, which tells neither a triple fault nor a second one apart."""
    return spec.on_reset == "stop" and spec.on_triple_fault in ("auto", "stop")


def direct_firmware(spec: VmSpec, boot: Boot) -> str | None:
    """The firmware of QEMU's by which a machine with a TPM is started directly, None if by the built-in one.

    On a PC this is qboot. QEMU puts the initrd 160 KiB below the top of RAM, and SeaBIOS the ACPI tables 192 KiB
    below it when there is a TPM (its event log takes 64): the initrd overwrites them, and the guest has neither ACPI
    nor TPM. qboot has its tables elsewhere; it boots Linux and PVH kernels and measures nothing itself.
    """
    is_direct = boot.initrd is not None and boot.firmware is None and not boot.needs_vga
    return architecture_of(spec).firmware.direct if is_direct else None


def command_line(
    spec: VmSpec,
    *,
    argv: Sequence[str],
    accelerator: str,
    boot: Boot,
    sockets: Sockets,
    mac: str = "",
    tpm: Sequence[str] = (),
    has_pvpanic: bool = True,
    has_reconnect_ms: bool = True,
    has_dbus_display: bool = False,
) -> list[str]:
    """The whole command line.

    Args:
        argv: how this QEMU is run (a binary, or a launcher with its arguments).
        accelerator: "kvm" or "tcg".
        boot: what to boot; its paths were checked.
        mac: of the network card; needed when there is one.
        tpm: the arguments that connect the TPM, from `rayos_tpm.qemu`.
        has_pvpanic: whether this QEMU knows `pvpanic-pci`, by which a guest tells of its panic.
        has_dbus_display: whether a display may be reached by D-Bus (`display_events.py`).
        has_reconnect_ms: whether a socket chardev takes `reconnect-ms` (QEMU 9.2) or only `reconnect`.

    Raises:
        Invalid: the memory is not a whole number of MiB.
    """
    if spec.memory_bytes % (1 << 20):
        raise Invalid(f"memory = {spec.memory!r} is not a whole number of MiB, as QEMU needs")
    arguments = [*argv, *_machine(spec, accelerator, boot)]
    display = "dbus,p2p=yes" if has_dbus_display and "gpu" in sockets.devices else "none"
    arguments += ["-nodefaults", "-no-user-config", "-display", display, "-vga", "none", "-nic", "none"]
    arguments += ["-sandbox", SANDBOX, "-S"]
    # A reset works as on hardware. A panic stops the guest where it is; the service notes it and ends it.
    reboot = "shutdown" if ends_at_reset(spec) else "reset"
    shutdown = "pause" if spec.on_shutdown == "pause" else "poweroff"
    arguments += ["-action", f"reboot={reboot},shutdown={shutdown},panic=pause,watchdog=reset"]
    # With TCG this tells a triple fault from a reboot: QMP does not.
    arguments += ["-d", architecture_of(spec).reset_log]
    arguments += ["-chardev", f"socket,id=qmp,fd={sockets.qmp_fd},server=on,wait=off", "-qmp", "chardev:qmp"]
    arguments += port_arguments(spec, sockets.line_fds, has_pvpanic=has_pvpanic)
    if spec.watchdog_device != "none":
        arguments += ["-device", spec.watchdog_device]
    arguments += _boot(spec, boot)
    if needs_usb(spec):
        arguments += ["-device", "qemu-xhci,id=usb"]
    for name in spec.input.usb:
        arguments += ["-device", f"{'usb-kbd' if name == 'keyboard' else f'usb-{name}'},bus=usb.0"]
    direct = direct_firmware(spec, boot)
    if tpm and direct is not None:
        arguments += ["-bios", direct]
    arguments += _devices(spec, boot, sockets, mac, has_reconnect_ms=has_reconnect_ms)
    arguments += tpm
    return arguments + list(spec.qemu_arguments)

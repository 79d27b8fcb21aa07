"""QEMU's command line as a pure function of what is asked for.

Invariants: no default device, no user configuration, no network of QEMU's own, the seccomp sandbox on. The
guest's memory is a sealed, shared memfd because the devices live in another process (vhost-user
specification, "Front-end message types", VHOST_USER_SET_MEM_TABLE). QEMU starts stopped (`-S`), so that
nothing that it says over QMP is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.qemu.arch import architecture_of, board_of
from rayos_vmm.qemu.boot import Boot, FirmwareKind
from rayos_vmm.qemu.buses import disk_arguments, needs_usb
from rayos_vmm.qemu.ports import port_arguments

SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
CONSOLE_DEVICE: Final = "vhost-user-test-device-pci"
_CONSOLE_VIRTIO_ID: Final = 3  # VIRTIO 1.3, 5.3: console device
# VIRTIO 1.3, 5.3.4: cols, rows (le16 each), max_nr_ports, emerg_wr (le32 each).
_CONSOLE_CONFIG_BYTES: Final = 2 + 2 + 4 + 4
NETDEV: Final = "nic0"


@dataclass(frozen=True, slots=True)
class Sockets:
    """Where QEMU finds its sockets. None: the machine does not have that device."""

    qmp_fd: int  # listening sockets that QEMU inherits
    line_fds: tuple[int, ...]  # of each of `spec.ports.lines`
    disks: tuple[Path, ...] = ()
    net: Path | None = None
    gpu: Path | None = None
    inputs: tuple[Path, ...] = ()
    console: Path | None = None  # the vhost-user device
    console_ports: tuple[Path, ...] = ()  # the fallback: one plain socket for each port


def _quote(path: Path) -> str:
    """A path inside a QEMU option: a comma is doubled."""
    return str(path).replace(",", ",,")


def _vhost_user(name: str, path: Path) -> list[str]:
    return ["-chardev", f"socket,id={name},path={_quote(path)}"]


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


def _console(sockets: Sockets, names: Sequence[str], packed: str, *, has_reconnect_ms: bool) -> list[str]:
    if sockets.console is not None:
        # VIRTIO 1.3, 5.3.2: a pair for port 0, a control pair, and a pair for every further port.
        queues = 2 + 2 * len(names)
        device = (
            f"{CONSOLE_DEVICE},chardev=console,virtio-id={_CONSOLE_VIRTIO_ID},"
            f"num_vqs={queues},config_size={_CONSOLE_CONFIG_BYTES}{packed}"
        )
        return [*_vhost_user("console", sockets.console), "-device", device]
    if not sockets.console_ports:
        return []
    arguments = ["-device", f"virtio-serial-pci,id=console,max_ports={len(names)}"]
    for port, path in enumerate(sockets.console_ports):
        kind = "virtconsole" if port == 0 else "virtserialport"
        # QEMU is the client: it comes back when the worker was replaced.
        again = "reconnect-ms=100" if has_reconnect_ms else "reconnect=1"
        arguments += ["-chardev", f"socket,id=port{port},path={_quote(path)},{again}"]
        arguments += ["-device", f"{kind},chardev=port{port},nr={port},name={names[port]}"]
    return arguments


def _devices(spec: VmSpec, boot: Boot, sockets: Sockets, mac: str, *, has_reconnect_ms: bool) -> list[str]:
    arguments: list[str] = []
    packed = ",packed=on" if spec.packed else ""
    for index, (disk, path) in enumerate(zip(spec.disks, sockets.disks, strict=True)):
        if disk.bus != "virtio":
            continue
        arguments += _vhost_user(f"disk{index}", path)
        queues, bootindex = spec.disk_queues(disk), index + 1
        arguments += [
            "-device",
            f"vhost-user-blk-pci,chardev=disk{index},num-queues={queues},bootindex={bootindex}{packed}",
        ]
    arguments += disk_arguments(spec, sockets.disks)
    if sockets.net is not None:
        arguments += _vhost_user("net0", sockets.net)
        pairs = spec.net.queues
        # A vector for each queue, the configuration and the control queue.
        multi = f",mq=on,vectors={2 * pairs + 2}" if pairs > 1 else ""
        arguments += ["-netdev", f"vhost-user,id={NETDEV},chardev=net0,queues={pairs}"]
        arguments += [
            "-device",
            f"virtio-net-pci,netdev={NETDEV},mac={mac},host_mtu={spec.net.mtu},romfile={multi}{packed}",
        ]
    if sockets.gpu is not None:
        vga = architecture_of(spec).vga if boot.needs_vga else None
        kind = vga or "vhost-user-gpu-pci"
        arguments += _vhost_user("gpu0", sockets.gpu)
        outputs = f"max_outputs={spec.gpu.scanouts},xres={spec.gpu.width},yres={spec.gpu.height}"
        # This wrapper alone offers RING_RESET by itself, and tells its backend nothing of a reset.
        arguments += ["-device", f"{kind},chardev=gpu0,queue_reset=off,{outputs}{packed}"]
    for path in sockets.inputs:
        name = path.stem
        arguments += [*_vhost_user(name, path), "-device", f"vhost-user-input-pci,chardev={name}{packed}"]
    return arguments + _console(sockets, spec.console_ports, packed, has_reconnect_ms=has_reconnect_ms)


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
        mac: of the network card; needed when `sockets.net` is there.
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
    display = "dbus,p2p=yes" if has_dbus_display and sockets.gpu is not None else "none"
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
    direct = direct_firmware(spec, boot)
    if tpm and direct is not None:
        arguments += ["-bios", direct]
    arguments += _devices(spec, boot, sockets, mac, has_reconnect_ms=has_reconnect_ms)
    arguments += tpm
    return arguments + list(spec.qemu_arguments)

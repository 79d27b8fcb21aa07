"""Brings a machine into being, piece by piece, and takes it apart again.

Invariant: whatever exists outside of the daemon is in the record, saved before the next piece is made. So one
function clears up after a failed start, an ended machine, and a daemon that was killed half-way.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from rayos_vmm.config.host import check_host, read_host
from rayos_vmm.errors import Busy, GuestGone
from rayos_vmm.hardware.protocols import WORKER_LOG, DiskImage, Hardware, Plugged
from rayos_vmm.host import cgroup
from rayos_vmm.host.confine import Reach, confined, program_directories
from rayos_vmm.host.identity import user
from rayos_vmm.host.process import ProcessId, adopt, find_by_output, spawn
from rayos_vmm.machine.images import prepare_disks, throw_away
from rayos_vmm.machine.line import line_socket
from rayos_vmm.machine.machine import PICTURE, Machine
from rayos_vmm.machine.needs import MeasuredTpm, Network, Platform, Tpms
from rayos_vmm.machine.record import Live
from rayos_vmm.qemu.arguments import Sockets, command_line
from rayos_vmm.qemu.boot import Boot, FirmwareKind, load_as_32_bit
from rayos_vmm.qemu.platform import Launch

QMP_SOCKET: Final = "qmp.sock"
LOG_FIFO: Final = "qemu.fifo"
SWTPM_LOG: Final = "swtpm.log"
_DISMANTLE_TIMEOUT_S: Final = 15.0
_READER_GRACE_S: Final = 6.0  # more than the reader of a disk gives its daemon


@dataclass(frozen=True, slots=True)
class Dependencies:
    """The parts that every machine is built from."""

    hardware: Hardware
    platform: Platform
    network: Network | None
    tpms: Tpms
    save: Callable[[Machine], Awaitable[None]]
    start_timeout_s: float = 60.0
    overcommit: bool = True
    takes_qemu_arguments: bool = True


def _make_directories(machine: Machine) -> None:
    shutil.rmtree(machine.runtime, ignore_errors=True)
    machine.runtime.mkdir(parents=True, mode=0o700)
    machine.state_directory.mkdir(parents=True, exist_ok=True, mode=0o700)


def _own_copies(boot: Boot, directory: Path) -> Boot:
    """The boot with copies that belong to this machine: of its UEFI variables, and of a kernel that is made to fit."""
    if boot.firmware_variables is not None and boot.firmware_kind is FirmwareKind.PFLASH:
        own = directory / "firmware-variables.fd"
        if not own.exists():
            shutil.copyfile(boot.firmware_variables, own)
        boot = dataclasses.replace(boot, firmware_variables=own)
    if boot.is_64_bit and boot.kernel is not None:
        load_as_32_bit(boot.kernel, directory / "kernel.elf")
        boot = dataclasses.replace(boot, kernel=directory / "kernel.elf")
    return boot


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


async def _start_tpm(
    machine: Machine, dependencies: Dependencies, boot: Boot, slot: int
) -> MeasuredTpm | None:
    if not machine.record.spec.tpm:
        return None
    tpm = await dependencies.tpms.start(
        machine.record,
        boot,
        runtime=machine.runtime,
        state=machine.state_directory / "tpm",
        log=machine.state_directory / SWTPM_LOG,
        slot=slot,
    )
    try:
        machine.record.live.swtpm = tpm.process
        await dependencies.save(machine)
    except BaseException:
        tpm.close()
        raise
    return tpm


async def _plug(
    machine: Machine, dependencies: Dependencies, launch: Launch, disks: list[DiskImage]
) -> Plugged:
    record, spec = machine.record, machine.record.spec
    tap_fds: list[int] = []
    mac = spec.net.mac or ""
    if spec.net.enabled and dependencies.network is not None:
        mac = mac or dependencies.network.mac(machine.name)
        tap, tap_fds = await dependencies.network.open_tap(
            machine.name, mac, mtu=spec.net.mtu, queues=spec.net.queues, upstream=spec.net.bridge
        )
        record.live.tap = tap
    record.mac = mac or None
    plugged = await dependencies.hardware.plug(
        spec,
        runtime=machine.runtime,
        logs=machine.state_directory,
        disks=disks,
        tap_fds=tap_fds,
        mac=mac,
        has_console=launch.has_console,
        needs_vga=launch.boot.needs_vga,
    )
    record.live.keeper, record.live.ports = plugged.keeper, plugged.ports
    record.live.readers = list(plugged.readers)
    await dependencies.save(machine)
    return plugged


def _reach(machine: Machine, launch: Launch, plugged: Plugged, tpm: MeasuredTpm | None) -> Reach:
    """The files and sockets that QEMU needs, and no others."""
    boot = tpm.boot if tpm else launch.boot
    sockets = (*plugged.sockets.values(), *plugged.console_ports)
    modules = (module.path for module in boot.modules)
    files = (boot.kernel, boot.initrd, boot.firmware, boot.cdrom, *modules)
    variables = boot.firmware_variables if boot.firmware_kind is FirmwareKind.PFLASH else None
    return Reach(
        read=[*program_directories(launch.argv), *(path.absolute() for path in files if path is not None)],
        write=[machine.runtime / PICTURE, *([] if variables is None else [variables])],
        sockets=[*sockets, *([tpm.socket] if tpm else [])],
        devices=[Path("/dev/kvm")] if launch.accelerator == "kvm" else [],
    )


def _start_qemu(machine: Machine, launch: Launch, plugged: Plugged, tpm: MeasuredTpm | None) -> None:
    fifo = machine.runtime / LOG_FIFO
    os.mkfifo(fifo, 0o600)
    (machine.runtime / PICTURE).touch(0o600)
    with ExitStack() as stack:
        qmp = stack.enter_context(_listen(machine.runtime / QMP_SOCKET))
        lines = tuple(
            stack.enter_context(_listen(line_socket(machine.runtime, name))).fileno()
            for name in machine.record.spec.ports.lines
        )
        argv = command_line(
            machine.record.spec,
            argv=launch.argv,
            accelerator=launch.accelerator,
            boot=tpm.boot if tpm else launch.boot,
            sockets=Sockets(
                qmp_fd=qmp.fileno(),
                line_fds=lines,
                devices=plugged.sockets,
                console_ports=plugged.console_ports,
            ),
            mac=machine.record.mac or "",
            tpm=tpm.arguments if tpm else (),
            has_pvpanic=launch.has_pvpanic,
            has_reconnect_ms=launch.has_reconnect_ms,
            has_dbus_display=launch.has_dbus_display,
        )
        argv = confined(argv, _reach(machine, launch, plugged, tpm), uid=user("qemu", plugged.slot))
        # Both ends are QEMU's: it neither gets SIGPIPE nor blocks when no daemon reads (a full pipe drops).
        output = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            inherited = (qmp.fileno(), *lines, *(tpm.descriptors if tpm else ()))
            machine.process = spawn(argv, output_fd=output, pass_fds=inherited)
        except OSError as error:
            raise GuestGone(f"{argv[0]} cannot be executed: {error.strerror}") from None
        finally:
            machine.log_fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.close(output)
    machine.record.live.qemu = machine.process.identity


async def build(machine: Machine, dependencies: Dependencies) -> None:
    """From nothing to a QEMU that waits for `cont`. After an error or cancellation call `dismantle`.

    Raises:
        RayosError: with what is missing or in the way.
    """
    spec = machine.record.spec
    machine.note(
        await trio.to_thread.run_sync(
            lambda: check_host(spec, read_host(), is_strict=not dependencies.overcommit)
        )
    )
    launch = await dependencies.platform.launch(spec)
    machine.note_stage("images", trio.current_time())
    try:
        _make_directories(machine)
        disks = await trio.to_thread.run_sync(prepare_disks, machine)
        boot = await trio.to_thread.run_sync(_own_copies, launch.boot, machine.state_directory)
    except OSError as error:
        raise Busy(f"{error.filename or machine.runtime}: {error.strerror}") from None
    launch = dataclasses.replace(launch, boot=boot)
    plugged = await _plug(machine, dependencies, launch, disks)
    machine.note_stage("devices", trio.current_time())
    tpm = await _start_tpm(machine, dependencies, launch.boot, plugged.slot)
    if tpm:
        machine.note_stage("tpm", trio.current_time())
    try:
        _start_qemu(machine, launch, plugged, tpm)
    finally:
        if tpm:
            tpm.close()
    await dependencies.save(machine)
    live = machine.record.live
    pids = [one.pid for one in (live.keeper, live.swtpm, live.qemu) if one is not None]
    why_not = await trio.to_thread.run_sync(cgroup.enclose, machine.record.group, spec.quota, pids)
    if why_not:
        machine.events.publish("vm.unbounded", machine.name, reason=why_not)


def orphans(runtime: Path, state: Path) -> list[ProcessId]:
    """The processes of a machine, found without its record. Blocking."""
    return find_by_output((runtime / LOG_FIFO, state / SWTPM_LOG, state / WORKER_LOG))


async def end_orphans(machine: Machine) -> None:
    """Ends processes that a killed service had started for the machine and had no time to record."""
    with trio.move_on_after(_DISMANTLE_TIMEOUT_S, shield=True):
        found = await trio.to_thread.run_sync(orphans, machine.runtime, machine.state_directory)
        for identity in found:
            process = adopt(identity)
            if process is not None:
                await process.end()
                process.close()


async def dismantle(machine: Machine, dependencies: Dependencies) -> None:
    """Ends what is left of a machine and removes its sockets; its disks and TPM stay. Cannot be cancelled.

    Works from the record alone, so it also clears up after a former daemon.
    """
    live = machine.record.live
    with trio.move_on_after(_DISMANTLE_TIMEOUT_S, shield=True):
        process = machine.process
        if process is None and live.qemu is not None:
            process = adopt(live.qemu)
        if process is not None:
            machine.evidence.exit_status = await process.end(grace_s=1.0)
            process.close()
        if live.keeper is not None:
            await dependencies.hardware.unplug(live.keeper, machine.runtime)
        for reader in map(adopt, live.readers):
            if reader is not None:
                await reader.end(grace_s=_READER_GRACE_S)
                reader.close()
        if live.swtpm is not None:
            await dependencies.tpms.stop(live.swtpm, machine.runtime)
        kills = await trio.to_thread.run_sync(cgroup.memory_kills, machine.record.group)
        machine.evidence.memory_kills = kills
        await trio.to_thread.run_sync(cgroup.remove, machine.record.group)
        await trio.to_thread.run_sync(throw_away, machine)
        await trio.to_thread.run_sync(lambda: shutil.rmtree(machine.runtime, ignore_errors=True))
    machine.process = None
    machine.close_log()
    machine.record.live = Live()

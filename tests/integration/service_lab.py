"""A service for a test: its own directories and bridge, machines without devices, and nothing left behind."""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from rayos_vmm.config.settings import ServiceConfig
from rayos_vmm.config.spec import Gpu, Net, VmSpec
from rayos_vmm.hardware.protocols import Hardware, NoHardware
from rayos_vmm.machine.line import SERIAL_PORT
from rayos_vmm.machine.view import VmState
from rayos_vmm.paths import Paths, default_paths
from rayos_vmm.service.service import Service, open_service

BRIDGE = "raytest0"


def bare(name: str = "svc", **fields: object) -> VmSpec:
    """A machine that wants no device."""
    return VmSpec(name=name, net=Net(enabled=False), gpu=Gpu(enabled=False), tpm=False, **fields)  # type: ignore[arg-type]


@asynccontextmanager
async def home() -> AsyncIterator[Paths]:
    """Directories of a service, short enough for sockets, gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="rayt", dir="/tmp"))
    try:
        yield Paths(directory / "s", directory / "r", default_paths().cache)
    finally:
        shutil.rmtree(directory)


@asynccontextmanager
async def lab(
    paths: Paths,
    *,
    hardware: Hardware | None = None,
    real: bool = False,
    network: bool = False,
    keep: bool = False,
    bridge: str = BRIDGE,
) -> AsyncIterator[Service]:
    """A service whose machines are gone afterwards, unless they are to be kept. `real`: with the service's own devices,
    under its policy and firewall; else none but `hardware`."""
    config = ServiceConfig(network=network, bridge=bridge)
    async with open_service(config, paths, hardware=None if real else hardware or NoHardware()) as service:
        try:
            yield service
        finally:
            with trio.CancelScope(shield=True):
                for view in await service.machines.list():
                    if not keep and view.state not in (VmState.DEFINED, VmState.STOPPED, VmState.FAILED):
                        await service.machines.kill(view.spec.name)


def traces(paths: Paths) -> set[str]:
    """Returns the traces of a living machine: sockets and directories, and processes that name them."""
    found = {str(path) for path in (paths.runtime / "vm").rglob("*")}
    marks = (bytes(paths.runtime), bytes(paths.state))
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                command = (process / "cmdline").read_bytes()
                output = bytes((process / "fd" / "1").readlink())  # QEMU's is a FIFO of the machine
            except OSError:
                continue
            if any(mark in command or mark in output for mark in marks):
                found.add(f"{process.name} {command[:200]!r}")
    return found


async def expect(
    service: Service, text: str, *, name: str = "svc", timeout_s: float = 30, port: int = SERIAL_PORT
) -> None:
    """Waits until a console port, the serial line by default, has said `text`."""
    seen = b""
    with trio.fail_after(timeout_s):
        async with service.guests.console_stream(name, port, 0) as chunks:
            async for _, data in chunks:
                seen += data
                if text.encode() in seen:
                    return
    raise AssertionError(f"port {port} ended without {text!r}: {seen[-500:]!r}")


async def running(service: Service, spec: VmSpec) -> None:
    """Defines, starts, waits for the ready line."""
    await service.machines.define(spec)
    await service.machines.start(spec.name)
    await service.machines.wait(spec.name, "ready", 60)


def multiboot(code: bytes) -> bytes:
    """A multiboot kernel (a.out kludge, Multiboot 0.6.96, 3.1.3) that runs `code` at 1 MiB + 32."""
    magic, flags, base = 0x1BADB002, 1 << 16, 0x100000
    header = struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFFFFFF)
    addresses = struct.pack("<IIIII", base, base, base + 32 + len(code), 0, base + 32)
    return header + addresses + code

"""The life of machines on a real QEMU with our guest, without devices: what runs, how it ends, and why.

`lab` and its helpers are used by the other `test_service_*` files.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import trio

from rayos_vmm.config.settings import ServiceConfig
from rayos_vmm.config.spec import Gpu, Net, VmSpec
from rayos_vmm.errors import Busy, Conflict, GuestGone, NotFound, Timeout_
from rayos_vmm.paths import Paths, default_paths
from rayos_vmm.service import Service, open_service
from rayos_vmm.vm.hardware import Hardware, NoHardware
from rayos_vmm.vm.machine import SERIAL_PORT
from rayos_vmm.vm.view import ExitReason, VmState

pytestmark = pytest.mark.guest

BRIDGE = "raytest0"


def bare(name: str = "a", **fields: object) -> VmSpec:
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
    paths: Paths, *, hardware: Hardware | None = None, network: bool = False
) -> AsyncIterator[Service]:
    """A service whose machines are gone afterwards."""
    config = ServiceConfig(network=network, bridge=BRIDGE)
    async with open_service(config, paths, hardware=hardware or NoHardware()) as service:
        try:
            yield service
        finally:
            with trio.CancelScope(shield=True):
                for view in await service.list():
                    if view.state not in (VmState.DEFINED, VmState.STOPPED, VmState.FAILED):
                        await service.kill(view.spec.name)


def traces(paths: Paths) -> set[str]:
    """What a machine leaves while it lives: sockets and directories, and processes that name them."""
    found = {str(path) for path in (paths.runtime / "vm").rglob("*")}
    marks = (bytes(paths.runtime), bytes(paths.state))
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if any(mark in command for mark in marks):
                found.add(f"{process.name} {command[:200]!r}")
    return found


async def expect(service: Service, text: str, *, name: str = "a", timeout_s: float = 30) -> None:
    """Waits until the serial line has said `text`."""
    seen = b""
    with trio.fail_after(timeout_s):
        async with service.console_stream(name, SERIAL_PORT, 0) as chunks:
            async for _, data in chunks:
                seen += data
                if text.encode() in seen:
                    return
    raise AssertionError(f"the serial line ended without {text!r}: {seen[-500:]!r}")


async def running(service: Service, spec: VmSpec) -> None:
    """Defines, starts, waits for the ready line."""
    await service.define(spec)
    await service.start(spec.name)
    await service.wait(spec.name, "ready", 60)


async def test_a_guest_boots_pauses_resets_and_powers_off() -> None:
    """The whole life in one piece, with an event for each step and boot times for each stage."""
    async with home() as paths:
        before = traces(paths)
        async with lab(paths) as service:
            await running(service, bare())
            view = await service.get("a")
            assert view.is_ready and view.pid is not None
            assert 0 < view.boot["qemu_ms"] < view.boot["running_ms"] < view.boot["ready_ms"]
            assert (await service.pause("a")).state is VmState.PAUSED
            assert (await service.qmp("a", "query-status"))["running"] is False
            assert (await service.resume("a")).state is VmState.RUNNING
            await service.console_write("a", SERIAL_PORT, b"\necho four$((2+2))\n")
            await expect(service, "four4")
            await service.reset("a")
            with pytest.raises(Timeout_, match=r"was not ready within 0\.2 s"):
                await service.wait("a", "ready", 0.2)
            await service.wait("a", "ready", 60)
            await service.console_write("a", SERIAL_PORT, b"\npoweroff -f\n")
            ended = await service.wait("a", "stopped", 20)
            assert (ended.state, ended.exit_reason) == (VmState.STOPPED, ExitReason.POWERED_OFF)
            assert traces(paths) == before
            assert (paths.vm_state("a") / "serial.log").read_bytes().count(b"RAYOS-READY") == 2
            await service.remove("a")
            assert not paths.vm_state("a").exists()
            with pytest.raises(NotFound):
                await service.get("a")
            events = []
            async with aclosing(service.events(0)) as log:
                async for event in log:
                    events.append((event.type, event.data.get("state")))
                    if event.type == "vm.removed":
                        break
            states = [state for kind, state in events if kind == "vm.state"]
            assert states == [
                "defined",
                "starting",
                "running",
                "paused",
                "running",
                "stopped",
            ]


async def test_a_panic_is_told_with_the_kernels_words() -> None:
    """The kernel's own reason, and a failed machine that can be started again."""
    async with home() as paths, lab(paths) as service:
        await running(service, bare())
        await service.console_write("a", SERIAL_PORT, b"\necho c > /proc/sysrq-trigger\n")
        ended = await service.wait("a", "stopped", 20)
        assert (ended.state, ended.exit_reason) == (VmState.FAILED, ExitReason.PANIC)
        assert ended.reason == "the guest's kernel panicked: sysrq triggered crash"
        await service.start("a")
        assert (await service.wait("a", "ready", 60)).exit_reason is None


def multiboot(code: bytes) -> bytes:
    """A multiboot kernel (a.out kludge, Multiboot 0.6.96, 3.1.3) that runs `code` at 1 MiB + 32."""
    magic, flags, base = 0x1BADB002, 1 << 16, 0x100000
    header = struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFFFFFF)
    addresses = struct.pack("<IIIII", base, base, base + 32 + len(code), 0, base + 32)
    return header + addresses + code


async def test_a_triple_fault_is_told_from_a_reset() -> None:
    """A hobby kernel's most common end: no interrupt table, then an interrupt."""
    async with home() as paths, lab(paths) as service:
        kernel = paths.state / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("6a00 6a00 0f011c24 cd03 f4")))  # lidt of zeros; int3
        await service.define(bare(kernel=str(kernel)))
        await service.start("a")
        ended = await service.wait("a", "stopped", 20)
        assert (ended.state, ended.exit_reason) == (VmState.FAILED, ExitReason.TRIPLE_FAULT)


async def test_a_reset_loop_ends_itself() -> None:
    """A kernel that resets by the keyboard controller, again and again."""
    async with home() as paths, lab(paths) as service:
        kernel = paths.state / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("b0fe e664 ebfe")))  # out 0x64, 0xfe; jmp $
        await service.define(bare(kernel=str(kernel)))
        await service.start("a")
        ended = await service.wait("a", "stopped", 60)
        assert (ended.state, ended.exit_reason) == (VmState.FAILED, ExitReason.RESET_LOOP)
        assert ended.reason == "the guest reset itself 5 times without getting ready"


async def test_a_dead_qemu_is_told_and_cleared_up() -> None:
    """Killed from outside: one sentence, nothing left, and the service lives on."""
    async with home() as paths, lab(paths) as service:
        before = traces(paths)
        await service.define(bare())
        pid = (await service.start("a")).pid
        assert pid is not None
        process = await trio.run_process(["kill", "-9", str(pid)])
        assert process.returncode == 0
        with pytest.raises(GuestGone, match="a is failed: QEMU died of SIGKILL"):
            await service.wait("a", "ready", 20)
        view = await service.get("a")
        assert view.exit_reason is ExitReason.QEMU_CRASHED and view.pid is None
        assert traces(paths) == before


async def test_stop_pulls_the_plug_of_a_guest_that_does_not_listen() -> None:
    """A kernel that halts for ever is asked, then killed, within the time limit."""
    async with home() as paths, lab(paths) as service:
        kernel = paths.state / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("f4 ebfd")))  # hlt; jmp
        await service.define(bare(kernel=str(kernel), ephemeral=True))
        await service.start("a")
        with trio.fail_after(10):
            view = await service.stop("a", timeout_s=0.5)
        assert (view.state, view.exit_reason) == (VmState.STOPPED, ExitReason.KILLED)
        assert await service.list() == []  # it was ephemeral
        assert not paths.vm_state("a").exists()


async def test_what_the_state_does_not_allow_is_refused() -> None:
    """Names taken, machines that run or do not: conflicts, with what to do."""
    async with home() as paths, lab(paths) as service:
        kernel = paths.state / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("f4 ebfd")))
        await service.define(bare(kernel=str(kernel)))
        with pytest.raises(Conflict, match="there is a machine a already"):
            await service.define(bare())
        with pytest.raises(Conflict, match="a is defined, not running"):
            await service.pause("a")
        with pytest.raises(Conflict, match="cannot stop while defined"):
            await service.stop("a")
        await service.start("a")
        with pytest.raises(Conflict, match="cannot start while running"):
            await service.start("a")
        with pytest.raises(Conflict, match="a is running"):
            await service.remove("a")
        with pytest.raises(NotFound, match="no machine 'b'; known: a"):
            await service.start("b")
        await service.kill("a")


async def test_one_service_owns_a_runtime_directory() -> None:
    """The second one is told who is there."""
    async with home() as paths, lab(paths):
        with pytest.raises(Busy, match="another service"):
            async with lab(paths):
                pass


async def test_an_idle_service_knows_that_it_is_idle() -> None:
    """Not while a client is there or a machine runs, but soon after."""
    async with home() as paths, lab(paths) as service:
        with service.client(), trio.move_on_after(0.3) as waited:
            await service.wait_idle(0.1)
        assert waited.cancelled_caught
        kernel = paths.state / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("f4 ebfd")))
        await service.define(bare(kernel=str(kernel)))
        await service.start("a")
        with trio.move_on_after(0.3) as waited:
            await service.wait_idle(0.1)
        assert waited.cancelled_caught
        await service.kill("a")
        with trio.fail_after(5):
            await service.wait_idle(0.1)

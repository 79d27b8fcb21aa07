"""The life of machines on a real QEMU with our guest, without devices: what runs, how it ends, and why."""

from __future__ import annotations

from contextlib import aclosing

import pytest
import trio

from rayos_vmm.config.spec import Watchdog
from rayos_vmm.errors import Busy, Conflict, GuestGone, NotFound, Timeout_
from rayos_vmm.machine.line import SERIAL_PORT
from rayos_vmm.machine.view import ExitReason, VmState
from tests.integration.service_lab import bare, expect, home, lab, multiboot, running, traces

pytestmark = pytest.mark.guest


async def test_a_guest_boots_pauses_resets_and_powers_off() -> None:
    """The whole life in one piece, with an event for each step and boot times for each stage."""
    async with home() as paths:
        before = traces(paths)
        async with lab(paths) as service:
            await running(service, bare())
            view = await service.machines.get("svc")
            assert view.is_ready and view.pid is not None
            assert 0 < view.boot["qemu_ms"] < view.boot["running_ms"] < view.boot["ready_ms"]
            assert (await service.machines.pause("svc")).state is VmState.PAUSED
            assert (await service.guests.qmp("svc", "query-status"))["running"] is False
            assert (await service.machines.resume("svc")).state is VmState.RUNNING
            await service.guests.console_write("svc", SERIAL_PORT, b"\necho four$((2+2))\n")
            await expect(service, "four4")
            await service.machines.reset("svc")
            with pytest.raises(Timeout_, match=r"was not ready within 0\.2 s"):
                await service.machines.wait("svc", "ready", 0.2)
            await service.machines.wait("svc", "ready", 60)
            await service.guests.console_write("svc", SERIAL_PORT, b"\npoweroff -f\n")
            ended = await service.machines.wait("svc", "stopped", 20)
            assert (ended.state, ended.exit_reason) == (VmState.STOPPED, ExitReason.POWERED_OFF)
            assert traces(paths) == before
            assert (paths.vm_state("svc") / "serial.log").read_bytes().count(b"RAYOS-READY") == 2
            await service.machines.remove("svc")
            assert not paths.vm_state("svc").exists()
            with pytest.raises(NotFound):
                await service.machines.get("svc")
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
        await service.guests.console_write("svc", SERIAL_PORT, b"\necho c > /proc/sysrq-trigger\n")
        ended = await service.machines.wait("svc", "stopped", 20)
        assert (ended.state, ended.exit_reason) == (VmState.FAILED, ExitReason.PANIC)
        assert ended.reason == "the guest's kernel panicked: sysrq triggered crash"
        await service.machines.start("svc")
        assert (await service.machines.wait("svc", "ready", 60)).exit_reason is None


async def test_a_triple_fault_is_told_from_a_reset() -> None:
    """A hobby kernel's most common end: no interrupt table, then an interrupt."""
    async with home() as paths, lab(paths) as service:
        kernel = paths.state / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("6a00 6a00 0f011c24 cd03 f4")))  # lidt of zeros; int3
        await service.machines.define(bare(kernel=str(kernel)))
        await service.machines.start("svc")
        ended = await service.machines.wait("svc", "stopped", 20)
        assert (ended.state, ended.exit_reason) == (VmState.FAILED, ExitReason.TRIPLE_FAULT)


async def test_a_reset_loop_ends_itself() -> None:
    """A kernel that resets by the keyboard controller, again and again."""
    async with home() as paths, lab(paths) as service:
        kernel = paths.state / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("b0fe e664 ebfe")))  # out 0x64, 0xfe; jmp $
        await service.machines.define(bare(kernel=str(kernel)))
        await service.machines.start("svc")
        ended = await service.machines.wait("svc", "stopped", 60)
        assert (ended.state, ended.exit_reason) == (VmState.FAILED, ExitReason.RESET_LOOP)
        assert ended.reason == "the guest reset itself 5 times without getting ready"


async def test_a_hang_is_told_from_a_guest_that_only_takes_long() -> None:
    """Both have a watchdog: the one that says nothing hangs, with where; the one that talks may go on until its
    time is over.
    """
    async with home() as paths, lab(paths) as service:
        silent, chatty = paths.state / "silent", paths.state / "chatty"
        silent.write_bytes(multiboot(bytes.fromhex("fa f4 ebfc")))  # cli; hlt; jmp
        chatty.write_bytes(multiboot(bytes.fromhex("66baf803 b02e b900000200 49 75fd ee ebf5")))
        await service.machines.define(bare(kernel=str(silent), watchdog=Watchdog(silence="1s", run="1h")))
        await service.machines.define(
            bare("chatty", kernel=str(chatty), watchdog=Watchdog(silence="2s", run="5s"))
        )
        await service.machines.start("svc")
        await service.machines.start("chatty")
        hung = await service.machines.wait("svc", "stopped", 60)
        assert (hung.state, hung.exit_reason) == (VmState.FAILED, ExitReason.HANG)
        assert "instruction pointer 00100" in hung.reason and "halted" in hung.reason
        ended = await service.machines.wait("chatty", "stopped", 60)
        assert (ended.exit_reason, ended.reason) == (
            ExitReason.TIMED_OUT,
            "it ran for the 5 s that it was given",
        )


async def test_a_dead_qemu_is_told_and_cleared_up() -> None:
    """Killed from outside: one sentence, nothing left, and the service lives on."""
    async with home() as paths, lab(paths) as service:
        before = traces(paths)
        await service.machines.define(bare())
        pid = (await service.machines.start("svc")).pid
        assert pid is not None
        process = await trio.run_process(["kill", "-9", str(pid)])
        assert process.returncode == 0
        with pytest.raises(GuestGone, match="svc is failed: QEMU died of SIGKILL"):
            await service.machines.wait("svc", "ready", 20)
        view = await service.machines.get("svc")
        assert view.exit_reason is ExitReason.QEMU_CRASHED and view.pid is None
        assert traces(paths) == before


async def test_stop_pulls_the_plug_of_a_guest_that_does_not_listen() -> None:
    """A kernel that halts for ever is asked, then killed, within the time limit."""
    async with home() as paths, lab(paths) as service:
        kernel = paths.state / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("f4 ebfd")))  # hlt; jmp
        await service.machines.define(bare(kernel=str(kernel), ephemeral=True))
        await service.machines.start("svc")
        with trio.fail_after(10):
            view = await service.machines.stop("svc", timeout_s=0.5)
        assert (view.state, view.exit_reason) == (VmState.STOPPED, ExitReason.KILLED)
        assert await service.machines.list() == []  # it was ephemeral
        assert not paths.vm_state("svc").exists()


async def test_what_the_state_does_not_allow_is_refused() -> None:
    """Names taken, machines that run or do not: conflicts, with what to do."""
    async with home() as paths, lab(paths) as service:
        kernel = paths.state / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("f4 ebfd")))
        await service.machines.define(bare(kernel=str(kernel)))
        with pytest.raises(Conflict, match="there is a machine svc already"):
            await service.machines.define(bare())
        with pytest.raises(Conflict, match="svc is defined, not running"):
            await service.machines.pause("svc")
        with pytest.raises(Conflict, match="cannot stop while defined"):
            await service.machines.stop("svc")
        await service.machines.start("svc")
        with pytest.raises(Conflict, match="cannot start while running"):
            await service.machines.start("svc")
        with pytest.raises(Conflict, match="svc is running"):
            await service.machines.remove("svc")
        with pytest.raises(NotFound, match="no machine 'b'; known: svc"):
            await service.machines.start("b")
        await service.machines.kill("svc")


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
        await service.machines.define(bare(kernel=str(kernel)))
        await service.machines.start("svc")
        with trio.move_on_after(0.3) as waited:
            await service.wait_idle(0.1)
        assert waited.cancelled_caught
        await service.machines.kill("svc")
        with trio.fail_after(5):
            await service.wait_idle(0.1)

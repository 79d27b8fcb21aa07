"""Killing the service kills no guest, and the next service takes over whatever it finds."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, closing
from pathlib import Path

import msgspec
import pytest
import trio

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Conflict, GuestGone
from rayos_vmm.host.process import start_time
from rayos_vmm.machine.line import SERIAL_PORT
from rayos_vmm.machine.view import ExitReason, VmState
from rayos_vmm.paths import Paths
from rayos_vmm.service.store import open_store
from tests.integration.service_lab import bare, expect, home, lab, multiboot, traces

pytestmark = pytest.mark.guest

# A service of its own that starts one machine, says so, and stays.
SERVICE = """
import sys, msgspec, trio
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.paths import Paths
from rayos_vmm.hardware.keeper import WorkerHardware
from tests.integration.service_lab import lab

async def main():
    spec = msgspec.json.decode(sys.argv[2], type=VmSpec)
    full = sys.argv[5] == "full"
    hardware = WorkerHardware() if full else None
    paths = Paths(*map(Path, sys.argv[1].split(":")))
    async with lab(paths, hardware=hardware, network=full) as service:
        await service.machines.define(spec)
        print("defined", flush=True)
        await service.machines.start(spec.name)
        if sys.argv[4] == "ready":
            await service.machines.wait(spec.name, "ready", 60)
        print("started", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@asynccontextmanager
async def killed_service(
    paths: Paths, spec: VmSpec, *, after: str, ready: bool = False, full: bool = False, delay_s: float = 0.0
) -> AsyncIterator[None]:
    """Runs a service until it says `after`, then kills it with SIGKILL."""
    places = f"{paths.state}:{paths.runtime}:{paths.cache}"
    arguments = [places, msgspec.json.encode(spec).decode(), str(Path(__file__).parents[2])]
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", SERVICE, *arguments, "ready" if ready else "running", "full" if full else ""],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with process.stdout:
        said = b""
        with trio.fail_after(60):
            while after.encode() not in said:
                chunk = await process.stdout.receive_some()
                assert chunk, f"the service ended after saying {said!r}"
                said += chunk
        await trio.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    yield


async def test_a_guest_outlives_its_service_and_is_adopted() -> None:
    """The same QEMU, running on, paused, asked, typed at and ended by the second service."""
    async with home() as paths:
        before = traces(paths)
        async with killed_service(paths, bare(), after="started", ready=True), lab(paths) as service:
            await service.machines.wait("svc", "running", 10)
            view = await service.machines.get("svc")
            assert view.pid is not None and start_time(view.pid) is not None
            assert view.is_ready and view.boot["ready_ms"] > 0
            await service.guests.console_write("svc", SERIAL_PORT, b"\necho six$((3+3))\n")
            await expect(service, "six6")
            await service.machines.pause("svc")
            assert (await service.machines.resume("svc")).state is VmState.RUNNING
            await service.guests.console_write("svc", SERIAL_PORT, b"\npoweroff -f\n")
            ended = await service.machines.wait("svc", "stopped", 20)
            assert (ended.state, ended.exit_reason) == (VmState.STOPPED, ExitReason.POWERED_OFF)
        assert traces(paths) == before


async def test_a_qemu_that_is_silent_is_waited_for_and_not_ended() -> None:
    """The service serves, says that the monitor does not answer, and goes on when it does."""
    async with home() as paths:
        before = traces(paths)
        async with killed_service(paths, bare(), after="started"):
            async with open_store(paths.database) as store:
                (record,), _ = await store.load()
            assert record.live.qemu is not None
            os.kill(record.live.qemu.pid, signal.SIGSTOP)
            async with lab(paths) as service:
                assert (await service.machines.get("svc")).state is VmState.ADOPTING
                with trio.fail_after(30):
                    async with aclosing(service.events(0)) as events:
                        async for event in events:
                            if event.type == "vm.silent":
                                break
                view = await service.machines.get("svc")
                assert view.state is VmState.ADOPTING and "monitor has not answered" in view.reason
                with pytest.raises(Conflict, match="is being adopted: QEMU's monitor"):
                    await service.guests.exec("svc", "true")
                os.kill(record.live.qemu.pid, signal.SIGCONT)
                view = await service.machines.wait("svc", "running", 30)
                assert (view.pid, view.reason) == (record.live.qemu.pid, "")
        async with lab(paths) as service:
            assert (await service.machines.get("svc")).exit_reason is ExitReason.KILLED
        assert traces(paths) == before


async def test_a_silent_qemu_can_be_killed() -> None:
    """Somebody who asks for its end gets it, although its monitor says nothing."""
    async with home() as paths, killed_service(paths, bare(), after="started"):
        async with open_store(paths.database) as store:
            (record,), _ = await store.load()
        assert record.live.qemu is not None
        os.kill(record.live.qemu.pid, signal.SIGSTOP)
        async with lab(paths) as service:
            with trio.fail_after(15):
                view = await service.machines.kill("svc")
            assert (view.state, view.exit_reason) == (VmState.STOPPED, ExitReason.KILLED)
            assert start_time(record.live.qemu.pid) is None


@pytest.mark.parametrize("damage", ["row", "file"])
async def test_what_runs_without_a_record_is_listed(damage: str) -> None:
    """A record that cannot be read, or a store that is gone, costs one machine its service and nobody else."""
    async with home() as paths:
        before = traces(paths)
        kernel = paths.state.parent / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("f4 ebfd")))
        async with lab(paths, keep=True) as service:
            for name in ("bad", "good"):
                await service.machines.define(bare(name, kernel=str(kernel)))
            pids = {name: (await service.machines.start(name)).pid for name in ("bad", "good")}
        if damage == "row":
            with closing(sqlite3.connect(paths.database)) as connection, connection:
                connection.execute("UPDATE vm SET record = substr(record, 9) WHERE name = 'bad'")
        else:
            for path in paths.state.glob("rayos.db*"):
                path.unlink()
        lost = ["bad"] if damage == "row" else ["bad", "good"]
        async with lab(paths) as service:
            for name in lost:
                view = await service.machines.get(name)
                assert (
                    view.state is VmState.FAILED
                    and f"without a record (processes {pids[name]}" in view.reason
                )
                with pytest.raises(Conflict, match="cannot be started"):
                    await service.machines.start(name)
                assert start_time(pids[name] or 0) is not None
            if damage == "row":
                assert (await service.machines.wait("good", "running", 10)).pid == pids["good"]
            for name in lost:
                await service.machines.remove(name)
                assert start_time(pids[name] or 0) is None
        assert traces(paths) == before


async def test_leaving_a_service_leaves_its_guests_running() -> None:
    """An orderly end is no different: the guest goes on, paused or not, and is found again."""
    async with home() as paths:
        kernel = paths.state.parent / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("f4 ebfd")))
        async with lab(paths, keep=True) as service:
            await service.machines.define(bare(kernel=str(kernel)))
            pid = (await service.machines.start("svc")).pid
            await service.machines.pause("svc")
        async with lab(paths) as service:
            with trio.fail_after(10):
                async with aclosing(service.events(0)) as events:
                    async for event in events:
                        if event.data.get("state") == "paused":
                            break
            assert (await service.machines.get("svc")).pid == pid


async def test_a_machine_that_ended_meanwhile_is_told_as_lost() -> None:
    """Nobody saw how; what it left behind is cleared up."""
    async with home() as paths:
        before = traces(paths)
        kernel = paths.state.parent / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("f4 ebfd")))
        async with killed_service(paths, bare(kernel=str(kernel)), after="started"):
            (pid,) = {trace.split()[0] for trace in traces(paths) if "rayos-qemu" in trace}
            os.kill(int(pid), signal.SIGKILL)
            async with lab(paths) as service:
                ended = await service.machines.wait("svc", "stopped", 10)
                assert (ended.state, ended.exit_reason) == (VmState.FAILED, ExitReason.LOST)
                with pytest.raises(GuestGone, match="nobody saw how"):
                    await service.machines.wait("svc", "running", 1)
                await service.machines.start("svc")
        assert traces(paths) == before


async def test_a_machine_caught_while_starting_is_cleared_up() -> None:
    """Killed between the first process and the last, the service leaves nothing that the next does not find."""
    async with home() as paths:
        before = traces(paths)
        spec = VmSpec(name="svc", net=bare().net, gpu=bare().gpu, tpm=True)
        async with killed_service(paths, spec, after="defined"), lab(paths) as service:
            view = await service.machines.wait("svc", "stopped", 20)
            assert view.state in (VmState.DEFINED, VmState.FAILED)
            assert traces(paths) == before
            await service.machines.start("svc")
            await service.machines.wait("svc", "ready", 60)
        assert traces(paths) == before

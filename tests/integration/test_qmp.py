"""QMP against a real QEMU: commands, errors, events, time limits, and a QEMU that dies."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from rayos_images.cache import Cache
from rayos_images.qemu import find
from rayos_vmm.errors import GuestGone, Timeout_
from rayos_vmm.host.process import Process, adopt, spawn
from rayos_vmm.paths import default_paths
from rayos_vmm.qemu.qmp import QmpRefused, open_qmp

pytestmark = pytest.mark.guest


@asynccontextmanager
async def bare_qemu() -> AsyncIterator[tuple[Path, Process]]:
    """A QEMU with nothing but a QMP socket, gone afterwards."""
    argv = find(Cache(default_paths().cache)).argv
    with tempfile.TemporaryDirectory(prefix="qmp") as directory:
        path = Path(directory) / "q"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            output = os.open(os.devnull, os.O_RDWR)
            machine = [*argv, "-M", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S"]
            chardev = f"socket,id=q,fd={listener.fileno()},server=on,wait=off"
            process = spawn(
                [*machine, "-chardev", chardev, "-qmp", "chardev:q"],
                output_fd=output,
                pass_fds=[listener.fileno()],
            )
            os.close(output)
        try:
            yield path, process
        finally:
            await process.end()
            process.close()


async def test_commands_answers_errors_and_events() -> None:
    """QEMU's answer comes back as a value, its refusal as an error of its own, its events in order."""
    async with bare_qemu() as (path, _), open_qmp(path) as qmp:
        assert (await qmp.execute("query-status"))["status"] == "prelaunch"
        with pytest.raises(QmpRefused, match="refused no-such: The command no-such") as refused:
            await qmp.execute("no-such")
        assert refused.value.qmp_class == "CommandNotFound"
        await qmp.execute("cont")
        await qmp.execute("stop")
        assert [(await qmp.next_event()).name for _ in range(2)] == ["RESUME", "STOP"]


async def test_a_second_connection_follows_the_first() -> None:
    """As after a restart of the service: the socket listens on and QEMU has not noticed."""
    async with bare_qemu() as (path, _):
        for _ in range(3):
            async with open_qmp(path) as qmp:
                assert await qmp.execute("query-name") == {}


async def test_a_qemu_that_dies_fails_every_wait_at_once() -> None:
    """A command under way, the event reader and whatever comes later get `GuestGone`, not a hang."""
    async with bare_qemu() as (path, process):
        with trio.fail_after(10):
            async with open_qmp(path) as qmp, trio.open_nursery() as nursery:
                failures: list[str] = []

                async def read() -> None:
                    try:
                        while True:
                            await qmp.next_event()
                    except GuestGone:
                        failures.append("event")

                nursery.start_soon(read)
                process.signal(signal.SIGKILL)
                with pytest.raises(GuestGone):
                    while True:
                        await qmp.execute("query-status")
                await qmp.wait_lost()
        assert failures == ["event"]
        assert await process.wait() == -signal.SIGKILL
        assert adopt(process.identity) is None
        with pytest.raises(GuestGone, match="does not answer"):
            async with open_qmp(path):
                pass


async def test_a_qemu_that_hangs_costs_the_time_limit_only() -> None:
    """The limit is the caller's; when QEMU goes on, so does the connection."""
    async with bare_qemu() as (path, process):
        async with open_qmp(path) as qmp:
            process.signal(signal.SIGSTOP)
            with pytest.raises(Timeout_, match=r"did not answer query-status within 0\.2 s"):
                await qmp.execute("query-status", timeout_s=0.2)
            process.signal(signal.SIGCONT)
            assert (await qmp.execute("query-status"))["running"] is False
        process.signal(signal.SIGSTOP)
        with pytest.raises(Timeout_, match="no QMP greeting"):
            async with open_qmp(path, timeout_s=0.2):
                pass
        process.signal(signal.SIGCONT)


async def test_any_task_may_execute() -> None:
    """Also one that was not born inside of the connection, as the API's tasks are."""
    results: list[object] = []
    async with bare_qemu() as (path, _), trio.open_nursery() as outside, open_qmp(path) as qmp:

        async def ask() -> None:
            results.append(await qmp.execute("query-status"))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
                outside.start_soon(ask)
        while len(results) < 10:
            await trio.lowlevel.checkpoint()

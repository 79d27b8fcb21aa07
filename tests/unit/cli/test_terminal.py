"""The terminal: keys reach the guest as they are, Ctrl-] leaves, and nothing of it stays changed."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from rayos_vmm.cli.terminal import raw_terminal
from rayos_vmm.config.spec import VmSpec
from tests.unit.api.memory_service import MemoryService
from tests.unit.api.serving import open_api

LIMIT_S = 20


def test_the_settings_come_back_whatever_happens() -> None:
    leader, follower = os.openpty()
    try:
        before = termios.tcgetattr(follower)
        with pytest.raises(RuntimeError), raw_terminal(follower):
            assert termios.tcgetattr(follower) != before
            raise RuntimeError
        assert termios.tcgetattr(follower) == before
    finally:
        os.close(leader)
        os.close(follower)


def resize(fd: int, columns: int, rows: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Screen:
    """The actions and the view of a person at the terminal."""

    def __init__(self, leader: int, follower: int, process: trio.Process) -> None:
        self.leader = leader
        self.follower = follower
        self.process = process
        self.seen = b""

    async def until(self, wanted: bytes) -> None:
        with trio.fail_after(LIMIT_S):
            while wanted not in self.seen:
                await trio.lowlevel.wait_readable(self.leader)
                self.seen += os.read(self.leader, 4096)

    async def until_size(self, service: MemoryService, columns: int, rows: int) -> None:
        with trio.fail_after(LIMIT_S):
            while ("dev", 0, columns, rows) not in service.sizes:  # noqa: ASYNC110 (there is no event for it)
                await trio.sleep(0.02)

    def press(self, keys: bytes) -> None:
        os.write(self.leader, keys)


@asynccontextmanager
async def open_screen(directory: Path, *options: str) -> AsyncIterator[Screen]:
    """`rayos console dev` on a terminal of 100x30."""
    leader, follower = os.openpty()
    resize(follower, 100, 30)
    command = [sys.executable, "-P", "-m", "rayos_vmm.cli", "console", "dev", *options]
    process = await trio.lowlevel.open_process(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        env={**os.environ, "RAYOS_RUNTIME_DIR": str(directory)},
    )
    try:
        yield Screen(leader, follower, process)
    finally:
        if process.poll() is None:
            process.kill()
        await process.wait()
        os.close(leader)
        os.close(follower)


@asynccontextmanager
async def at_the_console(directory: Path) -> AsyncIterator[tuple[Screen, MemoryService]]:
    """`rayos console dev` with a guest that says back what it is told."""
    async with open_api(directory) as (client, service):
        await client.create(VmSpec(name="dev"))
        async with open_screen(directory) as screen:
            yield screen, service


async def test_keys_go_in_raw_and_ctrl_bracket_leaves(tmp_path: Path) -> None:
    """Ctrl-C and Ctrl-Z are the guest's; the terminal is as before once we left."""
    async with at_the_console(tmp_path) as (screen, service):
        before = termios.tcgetattr(screen.follower)
        await screen.until(b"Ctrl-] detaches")
        screen.press(b"a\x03\x1a\rb")
        await screen.until(b"a\x03\x1a\rb")
        assert termios.tcgetattr(screen.follower) != before
        screen.press(b"last\x1d")
        await screen.until(b"detached")
        with trio.fail_after(LIMIT_S):
            assert await screen.process.wait() == 0
        assert termios.tcgetattr(screen.follower) == before
        assert service.consoles["dev", 0].tail() == b"a\x03\x1a\rblast"


async def test_the_guest_learns_the_size_and_its_changes(tmp_path: Path) -> None:
    async with at_the_console(tmp_path) as (screen, service):
        await screen.until_size(service, 100, 30)
        resize(screen.follower, 132, 43)
        screen.process.send_signal(signal.SIGWINCH)
        await screen.until_size(service, 132, 43)


async def test_the_end_of_the_guest_ends_the_command(tmp_path: Path) -> None:
    async with at_the_console(tmp_path) as (screen, service):
        screen.press(b"x")
        await screen.until(b"x")
        await service.machines.stop("dev")
        with trio.fail_after(LIMIT_S):
            assert await screen.process.wait() == 0


async def test_input_from_a_pipe_ends_the_command_after_the_answer(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"))
        with trio.fail_after(LIMIT_S):
            done = await trio.run_process(
                [sys.executable, "-P", "-m", "rayos_vmm.cli", "console", "dev"],
                stdin=b"uname\n",
                capture_stdout=True,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "RAYOS_RUNTIME_DIR": str(tmp_path)},
            )
        assert done.stdout == b"uname\n"


async def test_a_second_terminal_watches_until_it_takes_over(tmp_path: Path) -> None:
    """Who writes is said on both; what the watcher types is not; Ctrl-T hands over and tells the other."""
    async with at_the_console(tmp_path) as (first, service):
        await first.until(b"Ctrl-] detaches")
        async with open_screen(tmp_path) as second:
            await second.until(b"writes here; you watch. Ctrl-T takes over")
            second.press(b"lost")
            first.press(b"one")
            await second.until(b"one")
            second.press(b"\x14")
            await first.until(b"took over; you watch")
            await second.until(b"you write here now")
            second.press(b"two")
            await first.until(b"two")
            assert service.consoles["dev", 0].tail() == b"onetwo"
        await first.until(b"nobody writes here now")
        async with open_screen(tmp_path, "--take") as third:
            third.press(b"three")
            await first.until(b"three")

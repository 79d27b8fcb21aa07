"""Keepers forked from one parent: they live on without it, it comes back, and nobody is left that nobody wants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rayos_vmm.hardware.launch import Keeper, KeeperFailed, Spawner, stop_keeper
from rayos_vmm.host.identity import claim
from rayos_vmm.host.process import start_time
from rayos_vmm.shared.spec import Device


def make_disk(directory: Path, name: str) -> Device:
    image = directory / name
    image.write_bytes(bytes(1 << 20))
    return Device(kind="blk", name="disk", fd=os.open(image, os.O_RDWR | os.O_CLOEXEC))


async def start(spawner: Spawner, directory: Path, name: str) -> Keeper:
    run_dir = directory / name
    run_dir.mkdir()
    disk = make_disk(directory, f"{name}.img")
    try:
        with claim() as identity:
            return await spawner.start_keeper(name, run_dir, [disk], run_dir / "log", identity=identity)
    finally:
        os.close(disk.fd)


async def test_keepers_outlive_the_parent_which_is_started_again(tmp_path: Path) -> None:
    """Killed, the parent takes no keeper with it, and the next request starts another."""
    async with Spawner() as spawner:
        first = await start(spawner, tmp_path, "first")
        assert spawner.parent is not None
        spawner.parent.signal(9)
        await spawner.parent.wait()
        second = await start(spawner, tmp_path, "second")
    for keeper in (first, second):
        assert os.getsid(keeper.pid) == keeper.pid
        worker = keeper.worker()
        assert set(await worker.stats()) == {"disk"}
        worker.close()
        await stop_keeper(keeper)
        assert start_time(keeper.pid) is None


async def test_the_parent_keeps_nothing_of_a_machine(tmp_path: Path) -> None:
    """Neither image nor claim nor log: its descriptors are the same after as before, but for those of its children."""

    async def held(pid: int) -> set[tuple[str, str]]:
        found = {
            (path.name, str(await path.readlink())) for path in await trio.Path(f"/proc/{pid}/fd").iterdir()
        }
        return {entry for entry in found if "pidfd" not in entry[1]}

    async with Spawner() as spawner:
        await stop_keeper(await start(spawner, tmp_path, "first"))
        assert spawner.parent is not None
        before = await held(spawner.parent.pid)
        second = await start(spawner, tmp_path, "second")
        after = await held(spawner.parent.pid)
        await stop_keeper(second)
    assert before == after


async def test_a_keeper_that_is_not_waited_for_ends(tmp_path: Path) -> None:
    """Cancelled at the worst moment: after the request, before the answer."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    disk = make_disk(tmp_path, "image")
    async with Spawner() as spawner:
        await stop_keeper(await start(spawner, tmp_path, "first"))  # the parent has its code
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spawner.start_keeper, "vm", run_dir, [disk], run_dir / "log")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    os.close(disk.fd)
    assert [path.name for path in run_dir.iterdir()] == ["log"]
    assert "did not wait" in (run_dir / "log").read_text()


async def test_a_keeper_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The last line of its log is the error."""
    async with Spawner() as spawner:
        with pytest.raises(KeeperFailed, match=r"No such file or directory: '.*nowhere'"):
            await spawner.start_keeper("vm", tmp_path / "nowhere", [], tmp_path / "log")
        many = tuple(range(300))
        with pytest.raises(KeeperFailed, match="303 descriptors exceed 253"):
            await spawner.start_keeper(
                "vm", tmp_path, [Device(kind="net", name="net", queue_fds=many)], tmp_path / "log"
            )

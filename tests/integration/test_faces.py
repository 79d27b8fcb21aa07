"""The synchronous and the asyncio face of a guest: the same verbs, arguments and errors as trio's."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from rayos_vmm.errors import GuestGone, Timeout_
from rayos_vmm.testing import CommandFailed, Guest, PrivateDaemon, aio, faces, sync
from rayos_vmm.testing.pytest_plugin import GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.root]

SMALL = {"tpm": False, "gpu": {"enabled": False}, "net": {"enabled": False}, "memory": "128MiB"}


@pytest.mark.parametrize("face", faces.FACES, ids=lambda face: face.file)
def test_a_face_is_made_from_the_verbs(face: faces.Face) -> None:
    """A verb that was added or changed is so in both faces."""
    current = (faces.FOLDER / face.file).read_text()
    assert current == faces.render(face), "run .venv/bin/python -P -m rayos_vmm.testing.faces"


def test_every_face_has_every_verb() -> None:
    """Names and parameters are the same."""
    for name, verb in inspect.getmembers(Guest, inspect.isfunction):
        if not name.startswith("_"):
            for other in (sync.Guest, aio.Guest):
                assert list(inspect.signature(getattr(other, name)).parameters) == list(
                    inspect.signature(verb).parameters
                ), name


def test_a_script_without_a_loop(rayos_daemon: PrivateDaemon, tmp_path: Path) -> None:
    """Verbs return values, errors are the same classes, and the guest is gone behind the block."""
    with sync.open_guest(rayos_daemon, **SMALL) as guest:
        assert guest.succeed("echo one") == "one\n"
        with pytest.raises(CommandFailed, match="gave status 3"):
            guest.succeed("exit 3")
        guest.write_file("/tmp/data", b"\0\xff")
        assert guest.read_file("/tmp/data") == b"\0\xff"
        guest.console.send("echo done-$((6*7))\n")
        assert guest.console.expect("done-42")[0] == "done-42"
        guest.crash()
        with pytest.raises(GuestGone):
            guest.succeed("true")


def test_under_asyncio(rayos_daemon: PrivateDaemon) -> None:
    """The loop goes on while a verb waits, and a verb that is cancelled is over."""

    async def main() -> None:
        async with aio.open_guest(rayos_daemon, **SMALL) as guest:
            assert await guest.succeed("echo one") == "one\n"
            slow = asyncio.ensure_future(guest.succeed("sleep 60"))
            ticks = 0
            while ticks < 3:
                await asyncio.sleep(0)
                ticks += 1
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            assert await guest.succeed("echo two") == "two\n"

    # asyncio's own loop, whatever policy another test has left in this process.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(main())


async def test_words_of_a_tester(guest_factory: GuestFactory) -> None:
    """One of several texts, QEMU's events, a port that closes, a pipe whose first command fails, an ext4 disk."""
    async with guest_factory(disk="16MiB", **SMALL) as guest:
        await guest.console.send("echo second-$((1+1)) first-$((0+1))\n")
        which, match = await guest.console.expect_any("first-1", re.compile("SECOND-([0-9])", re.I))
        assert (which, match[0], match[3]) == (1, "second-2", "2")
        with pytest.raises(CommandFailed, match="gave status 1"):
            await guest.succeed("false | true")
        with pytest.raises(CommandFailed, match=r"not set|unset"):
            await guest.succeed("echo $nowhere")
        with pytest.raises(CommandFailed) as failure:
            await guest.succeed("seq 1000; false")
        assert len(str(failure.value).splitlines()) <= 13 and str(failure.value).endswith("999\n1000")
        await guest.succeed("nc -l -p 7 -w 60 >/dev/null 2>&1 & echo $! >/tmp/nc")
        await guest.wait_for_open_port(7, timeout=30)
        await guest.succeed("kill $(cat /tmp/nc)")
        await guest.wait_for_closed_port(7, timeout=30)
        async with trio.open_nursery() as nursery:

            async def hear() -> None:
                event = await guest.wait_for_event("RESET", guest=False)
                assert event.type == "vm.qemu"

            nursery.start_soon(hear)
            await trio.testing.wait_all_tasks_blocked(0.1)
            await guest.reset()
        with pytest.raises(Timeout_, match=r"no event vm\.nothing within 0\.1 s"):
            await guest.wait_for_event("vm.nothing", timeout=0.1)


async def test_an_ext4_disk_mounts(guest_factory: GuestFactory, tmp_path: Path) -> None:
    """The host's mkfs.ext4 with its defaults (metadata_csum), the guest's mount."""
    image = tmp_path / "ext4.img"
    image.touch()
    os.truncate(image, 16 << 20)
    await trio.run_process(["/sbin/mkfs.ext4", "-q", str(image)])
    async with guest_factory(disk=str(image), **SMALL) as guest:
        await guest.succeed(
            "mkdir /tmp/mnt; mount -t ext4 /dev/vda /tmp/mnt; echo kept >/tmp/mnt/file; umount /tmp/mnt"
        )
        assert await guest.succeed("mount -t ext4 /dev/vda /tmp/mnt; cat /tmp/mnt/file") == "kept\n"


def test_a_failure_shows_the_test_alone(pytester: pytest.Pytester) -> None:
    """Without frames of the library; `--pdb` holds the guest and says how to attach."""
    path = pytester.makepyfile(
        """
async def test_fails(guest_factory):
    async with guest_factory(tpm=False, gpu={"enabled": False}, net={"enabled": False}) as guest:
        await guest.succeed("exit 3")
"""
    )
    result = pytester.runpytest_subprocess("-q", str(path))
    result.assert_outcomes(failed=1)
    shown = result.stdout.str()
    assert "gave status 3, wanted 0" in shown
    assert "await self.run(" not in shown and "client.py" not in shown
    line = [sys.executable, "-P", "-m", "pytest", "-q", "--pdb", "-p", "no:cacheprovider", str(path)]
    told = subprocess.run(line, input="c\n", capture_output=True, text=True, timeout=120)
    assert "is held: RAYOS_RUNTIME_DIR=" in told.stdout, told.stdout


def test_one_guest_serves_a_module(pytester: pytest.Pytester) -> None:
    """A fixture of any scope boots once; a plain test and one for trio use the same factory."""
    pytester.makepyfile(
        """
import pytest

SMALL = {"tpm": False, "gpu": {"enabled": False}, "net": {"enabled": False}}

@pytest.fixture(scope="module")
def guest(module_guest_factory):
    return module_guest_factory(**SMALL)

def test_first(guest):
    guest.succeed("echo kept >/tmp/kept")

def test_second(guest):
    assert guest.succeed("cat /tmp/kept") == "kept\\n"

async def test_own(guest_factory):
    async with guest_factory(**SMALL) as guest:
        await guest.fail("test -e /tmp/kept")

def test_plain(guest_factory):
    with guest_factory(**SMALL) as guest:
        guest.fail("test -e /tmp/kept")

@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_theirs(guest_factory, anyio_backend):
    async with guest_factory(**SMALL) as guest:
        await guest.fail("test -e /tmp/kept")
"""
    )
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=5)

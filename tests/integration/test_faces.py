"""The synchronous and the asyncio face of a guest: the same verbs, arguments and errors as trio's."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import pytest

from rayos_vmm.errors import GuestGone
from rayos_vmm.testing import CommandFailed, Guest, PrivateDaemon, aio, faces, sync

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

    asyncio.run(main())


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

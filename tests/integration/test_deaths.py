"""A guest that dies while a verb waits ends that verb within a second, with the reason; what it left can be read."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from rayos_vmm.errors import GuestGone
from rayos_vmm.machine.view import ExitReason
from rayos_vmm.testing import Guest
from rayos_vmm.testing.console import NotSeen
from rayos_vmm.testing.pytest_plugin import GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.root]

Death = Callable[[Guest], Awaitable[None]]


async def _kill_qemu(guest: Guest) -> None:
    pid = (await guest.view()).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


async def _in_guest(guest: Guest, line: str) -> None:
    await guest.console.send(line + "\n")


DEATHS: dict[str, tuple[Death, ExitReason, str]] = {
    "power-off": (
        lambda guest: _in_guest(guest, "poweroff -f"),
        ExitReason.POWERED_OFF,
        "powered itself off",
    ),
    "panic": (lambda guest: _in_guest(guest, "echo c >/proc/sysrq-trigger"), ExitReason.PANIC, "panicked"),
    "killed QEMU": (_kill_qemu, ExitReason.QEMU_CRASHED, "SIGKILL"),
    "kill": (lambda guest: _done(guest.kill()), ExitReason.KILLED, "killed"),
}


async def _done(awaitable: Awaitable[object]) -> None:
    await awaitable


async def _damage(guest: Guest) -> None:
    serial = 0
    while True:  # the cursor blinks
        serial = (await guest.wait_damage(serial, timeout=60)).serial


#: Verbs that wait for the guest.
WAITS: dict[str, Callable[[Guest], Awaitable[object]]] = {
    "succeed": lambda guest: guest.succeed("sleep 100"),
    "wait_until_succeeds": lambda guest: guest.wait_until_succeeds("sleep 100; false"),
    "expect": lambda guest: guest.serial.expect("nobody says this", timeout=60),
    "console text": lambda guest: guest.console.expect("nobody says this", timeout=60),
    "damage": _damage,
    "screen": lambda guest: guest.wait_for_screen("no such hash", timeout=60),
    "read_file": lambda guest: guest.read_file("/tmp/fifo"),
    "shutdown": lambda guest: guest.wait_for_shutdown(),
}


@pytest.mark.parametrize("death", DEATHS)
async def test_each_wait_ends_with_the_guest(guest_factory: GuestFactory, death: str) -> None:
    """All verbs wait at once; the guest dies; each ends within a second of the end, and says why."""
    die, exit_reason, words = DEATHS[death]
    ended: dict[str, tuple[float, BaseException | None]] = {}

    async with guest_factory(tpm=False, memory="128MiB") as guest:
        await guest.succeed("mkfifo /tmp/fifo; printf '\\033[2J\\033[?25l' >/dev/tty0")

        async def waiting(name: str) -> None:
            try:
                await WAITS[name](guest)
            except (GuestGone, NotSeen) as error:
                ended[name] = trio.current_time(), error
            else:
                ended[name] = trio.current_time(), None

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for name in WAITS:
                    nursery.start_soon(waiting, name)
                await trio.testing.wait_all_tasks_blocked(0.2)
                await die(guest)
                gone = await guest.wait_for_shutdown()
                at = trio.current_time()
        assert gone.exit_reason is exit_reason
        assert words in gone.reason
        for name, (when, error) in ended.items():
            assert when - at < 1.0, name
            assert error is None or words in str(error), (name, error)
        assert [name for name, (_, error) in ended.items() if error is None] == ["shutdown"]
        assert "RAYOS-READY" in await guest.log.text()
        assert (await guest.stats())["net"]["operations"]
        assert (await guest.screenshot()).startswith(b"\x89PNG")
        with pytest.raises(GuestGone, match=words):
            await guest.succeed("true")

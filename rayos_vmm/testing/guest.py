"""One guest in a test. The verbs are those of the NixOS test driver, where it has one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import trio

from rayos_vmm.client.client import Client
from rayos_vmm.config.fault import parse_fault
from rayos_vmm.contract import asks, operations
from rayos_vmm.errors import RayosError, Timeout_
from rayos_vmm.events import Event
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.machine.view import Damage, ExecResult, VmView
from rayos_vmm.shared.console_text import fold
from rayos_vmm.shared.tap import Case, read_tap
from rayos_vmm.testing.console import GuestConsole, NotSeen, Pattern, last_lines
from rayos_vmm.testing.picture import Picture
from rayos_vmm.testing.screen import PictureNotSeen, Region, Wanted, wait_for_picture

COMMAND_TIMEOUT_S: Final = 900.0
RETRY_S: Final = 0.2
#: Before a line that has to succeed: any command of it that fails is its failure.
STRICT: Final = "set -euo pipefail; "
SHELL_PORT: Final = 0
LOG_PORT: Final = 2
SERIAL_PORT: Final = 31


class CommandFailed(AssertionError):
    """A command in the guest did not end as the test demands; `result` has what it said."""

    def __init__(self, command: str, result: ExecResult, wanted: str) -> None:
        said = last_lines((result.stdout + result.stderr).decode(errors="replace"))
        super().__init__(f"{command!r} gave status {result.exit_status}, wanted {wanted}; it said:\n{said}")
        self.result = result


def _listening(port: int) -> str:
    """A command that succeeds while something listens at a TCP port."""
    # proc(5), /proc/net/tcp: local address, remote, TCP_LISTEN
    return f"grep -qs ':{port:04X} [0-9A-F]*:0000 0A ' /proc/net/tcp /proc/net/tcp6"


def _is_event(event: Event, name: str, data: Mapping[str, Any]) -> bool:
    seen = event.data
    if event.type != name:
        if event.type != "vm.qemu" or seen.get("event") != name:
            return False
        seen = seen.get("data", {})
    return all(key in seen and seen[key] == value for key, value in data.items())


class Subtests(Protocol):
    """Pytest's fixture of that name, as far as it is used here."""

    def test(self, msg: str | None = None) -> AbstractContextManager[None]: ...


class Guest:
    """A running guest. Use `open_guest`, or the fixture `guest_factory`."""

    def __init__(self, client: Client, view: VmView, runtime: Path) -> None:
        self.client = client
        self.name = view.spec.name
        self.spec = view.spec
        self._runtime = runtime
        self.console = GuestConsole(client, self.name, SHELL_PORT)
        self.log = GuestConsole(client, self.name, LOG_PORT)
        self.serial = GuestConsole(client, self.name, SERIAL_PORT)

    async def view(self) -> VmView:
        """Its state, address and boot times now."""
        return await self.client.get(self.name)

    # Commands

    async def run(self, command: str | list[str], *, timeout: float = COMMAND_TIMEOUT_S) -> ExecResult:
        """Runs a shell line, or a program with its arguments; the streams apart, as bytes."""
        return await self.client.exec(self.name, command, timeout_s=timeout)

    async def execute(self, command: str, *, timeout: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
        """(exit status, standard output) of a shell line."""
        result = await self.run(command, timeout=timeout)
        return result.exit_status, result.stdout.decode(errors="replace")

    async def succeed(self, *commands: str, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """The standard output of shell lines that all end with status 0.

        A line runs under `set -euo pipefail`, as in the NixOS test driver.

        Raises:
            CommandFailed: one did not.
        """
        output = ""
        for command in commands:
            result = await self.run(f"{STRICT}{command}", timeout=timeout)
            if result.exit_status != 0:
                raise CommandFailed(command, result, "0")
            output += result.stdout.decode(errors="replace")
        return output

    async def fail(self, *commands: str, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """The standard output of shell lines that all end with another status than 0.

        Raises:
            CommandFailed: one ended with 0.
        """
        output = ""
        for command in commands:
            result = await self.run(command, timeout=timeout)
            if result.exit_status == 0:
                raise CommandFailed(command, result, "another")
            output += result.stdout.decode(errors="replace")
        return output

    async def _retry(self, command: str, timeout: float, *, is_success_wanted: bool) -> str:
        deadline = trio.current_time() + timeout
        while True:
            try:
                result = await self.run(command, timeout=max(1.0, deadline - trio.current_time()))
            except Timeout_:  # after a reset the agent may take a while
                if trio.current_time() >= deadline:
                    raise
                continue
            if (result.exit_status == 0) is is_success_wanted:
                return result.stdout.decode(errors="replace")
            if trio.current_time() >= deadline:
                wanted = f"{'0' if is_success_wanted else 'another'} within {timeout:g} s"
                raise CommandFailed(command, result, wanted)
            await trio.sleep(RETRY_S)  # what a command finds in the guest comes without an event

    async def wait_until_succeeds(self, command: str, *, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """Runs a shell line again and again until it ends with 0; its standard output then.

        Raises:
            CommandFailed: it did not within `timeout` seconds.
        """
        return await self._retry(command, timeout, is_success_wanted=True)

    async def wait_until_fails(self, command: str, *, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """Runs a shell line again and again until it does not end with 0; its standard output then.

        Raises:
            CommandFailed: it did not within `timeout` seconds.
        """
        return await self._retry(command, timeout, is_success_wanted=False)

    # Files

    async def read_file(self, path: str) -> bytes:
        """A file's content."""
        return await self.client.read_file(self.name, path)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Writes a file."""
        await self.client.write_file(self.name, path, data, mode=mode)

    # Seat

    async def wait_for_console_text(self, wanted: Pattern, *, timeout: float = 60.0) -> re.Match[str]:
        """Waits until the serial console has said `wanted` at any time since the start.

        Raises:
            NotSeen: it did not within `timeout` seconds.
        """
        match, _ = await self.serial.search(wanted, since=0, timeout=timeout)
        return match

    async def results(self) -> list[Case]:
        """The test results that its serial console has printed so far (TAP, KTAP), in their order."""
        said = await self.client.console_log(self.name, SERIAL_PORT)
        return list(read_tap(fold(said).decode(errors="replace").splitlines()))

    async def report_results(self, subtests: Subtests) -> None:
        """Has each of `results` as a subtest of this test; `subtests` is pytest's fixture.

        Raises:
            NotSeen: it printed none.
        """
        cases = await self.results()
        if not cases:
            raise NotSeen(f"{self.name} printed no test results (TAP, KTAP) on its serial console")
        for case in cases:
            with subtests.test(case.name):
                assert case.is_ok, case.message

    async def wait_for_file(self, path: str, *, timeout: float = COMMAND_TIMEOUT_S) -> None:
        """Waits until there is such a file in the guest."""
        await self.wait_until_succeeds(f"test -e {shlex.quote(path)}", timeout=timeout)

    async def wait_for_open_port(self, port: int, *, timeout: float = COMMAND_TIMEOUT_S) -> None:
        """Waits until something in the guest listens at a TCP port."""
        await self.wait_until_succeeds(_listening(port), timeout=timeout)

    async def wait_for_closed_port(self, port: int, *, timeout: float = COMMAND_TIMEOUT_S) -> None:
        """Waits until nothing in the guest listens at a TCP port."""
        await self.wait_until_fails(_listening(port), timeout=timeout)

    async def wait_for_event(self, name: str, *, timeout: float = 60.0, **data: Any) -> Event:
        """Waits for an event of this guest from now on, such as `vm.ready`, or QEMU's own by its name (`RESET`).

        Args:
            name: as `rayos events` shows it, or the name of a QMP event.
            data: fields that the event must have, with their values.

        Raises:
            Timeout_: there was none within `timeout` seconds.
        """
        with trio.move_on_after(timeout):
            async with self.client.events() as events:
                async for event in events:
                    if event.vm == self.name and _is_event(event, name, data):
                        return event
        raise Timeout_(f"{self.name}: there was no event {name} within {timeout:g} s")

    async def send_chars(self, text: str) -> None:
        """Types on the keyboard."""
        await self.client.type_text(self.name, text)

    async def send_key(self, combo: str) -> None:
        """Presses keys together, such as `ctrl-alt-delete`."""
        await self.client.send_key(self.name, combo)

    async def move_pointer(self, x: float, y: float, *buttons: str) -> None:
        """Moves the tablet to (x, y) in 0..1 with `buttons` held; none releases all."""
        await self.client.pointer(self.name, x, y, buttons)

    async def screenshot(
        self, path: Path | None = None, *, scanout: int = 0, with_cursor: bool = False
    ) -> bytes:
        """Returns a monitor's picture as a PNG; also saved at `path`."""
        picture = await self.client.screenshot(self.name, scanout=scanout, with_cursor=with_cursor)
        if path is not None:
            await trio.Path(path).write_bytes(picture)
        return picture

    async def wait_damage(self, since: int = 0, *, scanout: int = 0, timeout: float = 60.0) -> Damage:
        """Waits until a monitor's picture changes after serial `since`; what of it did, and the next serial.

        Raises:
            Timeout_: nothing changed within `timeout` seconds.
        """
        return await self.client.wait_damage(self.name, since, scanout, timeout_s=timeout)

    async def wait_for_screen(
        self, wanted: Wanted, *, region: Region | None = None, scanout: int = 0, timeout: float = 60.0
    ) -> Picture:
        """Waits until the display, or `region` (x, y, width, height) of it, shows `wanted`. That is a picture, the
        path of a PNG that we wrote, a `Picture.sha256`, or a function that says so of a `Picture`. Driven by damage.

        Raises:
            PictureNotSeen: it did not within `timeout` seconds; with the hash of what it showed.
        """
        return await wait_for_picture(
            self.client, self.name, wanted, region=region, scanout=scanout, timeout=timeout
        )

    # The machine

    async def block(self) -> None:
        """Pulls its network cable."""
        await self._set_cable(is_plugged=False)

    async def unblock(self) -> None:
        """Plugs its network cable in again."""
        await self._set_cable(is_plugged=True)

    async def _set_cable(self, *, is_plugged: bool) -> None:
        await self.client.call(operations.NET_LINK, self.name, body=asks.Link(up=is_plugged))

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """A QMP command; `_` in an argument's name stands for `-`."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        return await self.client.qmp(self.name, command, named or None)

    async def stats(self) -> dict[str, Any]:
        """Returns the counters of its devices."""
        return await self.client.stats(self.name)

    async def pause(self) -> None:
        """Stops its processors."""
        await self.client.act(self.name, "pause")

    async def resume(self) -> None:
        """Lets its processors go on."""
        await self.client.act(self.name, "resume")

    async def reset(self) -> None:
        """Presses the reset button."""
        await self.client.act(self.name, "reset")

    async def start(self, *, timeout: float = 120.0) -> None:
        """Starts it again after it stopped, and waits until it is ready."""
        await self.client.act(self.name, "start")
        for console in (self.console, self.log, self.serial):
            console.position = 0
        await self.client.wait(self.name, "ready", timeout_s=timeout)

    async def stop(self, *, timeout: float = 20.0) -> VmView:
        """Has the guest power down."""
        return await self.client.stop(self.name, timeout_s=timeout)

    async def kill(self) -> VmView:
        """Ends it at once."""
        return await self.client.act(self.name, "kill")

    async def crash(self) -> VmView:
        """As when the power fails: nothing is written any more. `start` boots it again from the same disks."""
        return await self.kill()

    async def wait_for_shutdown(self, *, timeout: float = 60.0) -> VmView:
        """Waits until it has ended; `exit_reason` of the view is why."""
        return await self.client.wait(self.name, "stopped", timeout_s=timeout)

    async def set_faults(self, device: str, *rules: str, seed: int = 0) -> None:
        """Has a disk or network card fail on purpose, such as `set_faults("disk0", "read:error,sector=128")`; without
        rules it works again. `rayos fault set --help` has the words.
        """
        body = asks.SetFaults(device=device, rules=[parse_fault(rule) for rule in rules], seed=seed)
        await self.client.call(operations.FAULTS_SET, self.name, body=body)

    async def faults(self) -> dict[str, list[dict[str, Any]]]:
        """The faults of each device, with how often each `matched` and was `done`."""
        found: dict[str, list[dict[str, Any]]] = msgspec.to_builtins(
            await self.client.call(operations.FAULTS_GET, self.name)
        )
        return found

    async def kill_worker(self) -> int:
        """Kills its device worker with SIGKILL, as a test of everything above; returns the pid it had."""
        keeper = KeeperClient(self._runtime)
        try:
            return await keeper.kill_worker()
        finally:
            keeper.close()

    # What is left of it

    def attach(self) -> str:
        """The commands that get at it by hand while it is there."""
        rayos = f"RAYOS_RUNTIME_DIR={self._runtime.parents[1]} rayos"
        return f"{rayos} console {self.name}\n{rayos} exec {self.name} -- sh\n{rayos} rm -f {self.name}\n"

    async def save_artifacts(self, directory: Path) -> None:
        """Saves consoles, QMP's transcript, state, statistics and the last frame in `directory`. The file
        `attach.txt` has the commands that reach the guest while it is there. For each part that cannot be had the
        reason is saved.
        """
        folder = trio.Path(directory)
        await folder.mkdir(parents=True, exist_ok=True)
        for name, console in (("shell", self.console), ("log", self.log), ("serial", self.serial)):
            await (folder / f"{name}.txt").write_text(await console.text())
        await (folder / "attach.txt").write_text(self.attach())
        for name, get in (
            ("last-frame.png", "screenshot"),
            ("qmp.jsonl", "qmp"),
            ("state.json", ""),
            ("stats.json", "stats"),
        ):
            path = f"/vms/{self.name}/{get}".rstrip("/")
            try:
                data = await self.client.request("GET", path, timeout_s=10)
            except RayosError as error:
                data = str(error).encode()
                name += ".missing"
            await (folder / name).write_bytes(data)


__all__ = ["CommandFailed", "Guest", "NotSeen", "PictureNotSeen"]

"""Guests for code that is not asynchronous: scripts, Jupyter, unittest, plain test functions.

    with open_guest(disk="64MiB") as guest:
        guest.succeed("mkfs.ext4 /dev/vda")

Made from guest.py and console.py by `python -m rayos_vmm.testing.faces`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.events import Event
from rayos_vmm.machine.view import Damage, ExecResult, VmView
from rayos_vmm.shared.tap import Case
from rayos_vmm.testing import console as _console
from rayos_vmm.testing import guest as _guest
from rayos_vmm.testing.console import TIMEOUT_S, Pattern
from rayos_vmm.testing.daemon import PrivateDaemon, open_private_daemon
from rayos_vmm.testing.guest import COMMAND_TIMEOUT_S, Subtests
from rayos_vmm.testing.open import open_guest as _open_guest
from rayos_vmm.testing.picture import Picture
from rayos_vmm.testing.portal import Portal, open_portal
from rayos_vmm.testing.screen import Region, Wanted


class GuestConsole:
    """One port of one guest. `position` is the offset behind the last match."""

    def __init__(self, inner: _console.GuestConsole, portal: Portal) -> None:
        self._inner = inner
        self._portal = portal

    def expect(self, wanted: Pattern, *, timeout: float = TIMEOUT_S) -> re.Match[str]:
        """Waits until the console has said `wanted` since the last match; returns the match.

        Raises:
            NotSeen: it did not within `timeout` seconds, or the console ended; with what it said instead.
        """
        return self._portal.call(partial(self._inner.expect, wanted, timeout=timeout))

    def expect_any(self, *wanted: Pattern, timeout: float = TIMEOUT_S) -> tuple[int, re.Match[str]]:
        """Waits until the console has said one of `wanted` since the last match; returns which, and the match.

        Of several in the same text the first in it counts, of several at one place the first that was named. A
        pattern with groups has them in the match, behind those of the patterns before it.

        Raises:
            NotSeen: none came within `timeout` seconds, or the console ended; with what it said instead.
        """
        return self._portal.call(partial(self._inner.expect_any, *wanted, timeout=timeout))

    def search(self, wanted: Pattern, *, since: int, timeout: float) -> tuple[re.Match[str], int]:
        """The first match from offset `since` on, and the offset behind it.

        Raises:
            NotSeen: there was none within `timeout` seconds, or the console ended.
        """
        return self._portal.call(partial(self._inner.search, wanted, since=since, timeout=timeout))

    def send(self, text: str | bytes) -> None:
        """Types into the console; end a line with `\\n` to have a shell run it.

        Raises:
            Conflict: somebody else writes there.
        """
        self._portal.call(partial(self._inner.send, text))

    def text(self) -> str:
        """All that is kept of what it said; empty when the console cannot be read any more."""
        return self._portal.call(partial(self._inner.text))


class Guest:
    """A running guest. Use `open_guest`, or the fixture `guest_factory`."""

    def __init__(self, inner: _guest.Guest, portal: Portal) -> None:
        self._inner = inner
        self._portal = portal
        self.console = GuestConsole(inner.console, portal)
        self.log = GuestConsole(inner.log, portal)
        self.serial = GuestConsole(inner.serial, portal)

    @property
    def name(self) -> str:
        """Its name."""
        return self._inner.name

    @property
    def spec(self) -> VmSpec:
        """Its specification."""
        return self._inner.spec

    def view(self) -> VmView:
        """Its state, address and boot times now."""
        return self._portal.call(partial(self._inner.view))

    def run(self, command: str | list[str], *, timeout: float = COMMAND_TIMEOUT_S) -> ExecResult:
        """Runs a shell line, or a program with its arguments; the streams apart, as bytes."""
        return self._portal.call(partial(self._inner.run, command, timeout=timeout))

    def execute(self, command: str, *, timeout: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
        """(exit status, standard output) of a shell line."""
        return self._portal.call(partial(self._inner.execute, command, timeout=timeout))

    def succeed(self, *commands: str, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """The standard output of shell lines that all end with status 0.

        A line runs under `set -euo pipefail`, as in the NixOS test driver.

        Raises:
            CommandFailed: one did not.
        """
        return self._portal.call(partial(self._inner.succeed, *commands, timeout=timeout))

    def fail(self, *commands: str, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """The standard output of shell lines that all end with another status than 0.

        Raises:
            CommandFailed: one ended with 0.
        """
        return self._portal.call(partial(self._inner.fail, *commands, timeout=timeout))

    def wait_until_succeeds(self, command: str, *, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """Runs a shell line again and again until it ends with 0; its standard output then.

        Raises:
            CommandFailed: it did not within `timeout` seconds.
        """
        return self._portal.call(partial(self._inner.wait_until_succeeds, command, timeout=timeout))

    def wait_until_fails(self, command: str, *, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """Runs a shell line again and again until it does not end with 0; its standard output then.

        Raises:
            CommandFailed: it did not within `timeout` seconds.
        """
        return self._portal.call(partial(self._inner.wait_until_fails, command, timeout=timeout))

    def read_file(self, path: str) -> bytes:
        """A file's content."""
        return self._portal.call(partial(self._inner.read_file, path))

    def write_file(self, path: str, data: bytes, *, mode: int = 420) -> None:
        """Writes a file."""
        self._portal.call(partial(self._inner.write_file, path, data, mode=mode))

    def wait_for_console_text(self, wanted: Pattern, *, timeout: float = 60.0) -> re.Match[str]:
        """Waits until the serial console has said `wanted` at any time since the start.

        Raises:
            NotSeen: it did not within `timeout` seconds.
        """
        return self._portal.call(partial(self._inner.wait_for_console_text, wanted, timeout=timeout))

    def results(self) -> list[Case]:
        """The test results that its serial console has printed so far (TAP, KTAP), in their order."""
        return self._portal.call(partial(self._inner.results))

    def report_results(self, subtests: Subtests) -> None:
        """Has each of `results` as a subtest of this test; `subtests` is pytest's fixture.

        Raises:
            NotSeen: it printed none.
        """
        self._portal.call(partial(self._inner.report_results, subtests))

    def wait_for_file(self, path: str, *, timeout: float = COMMAND_TIMEOUT_S) -> None:
        """Waits until there is such a file in the guest."""
        self._portal.call(partial(self._inner.wait_for_file, path, timeout=timeout))

    def wait_for_open_port(self, port: int, *, timeout: float = COMMAND_TIMEOUT_S) -> None:
        """Waits until something in the guest listens at a TCP port."""
        self._portal.call(partial(self._inner.wait_for_open_port, port, timeout=timeout))

    def wait_for_closed_port(self, port: int, *, timeout: float = COMMAND_TIMEOUT_S) -> None:
        """Waits until nothing in the guest listens at a TCP port."""
        self._portal.call(partial(self._inner.wait_for_closed_port, port, timeout=timeout))

    def wait_for_event(self, name: str, *, timeout: float = 60.0, **data: Any) -> Event:
        """Waits for an event of this guest from now on, such as `vm.ready`, or QEMU's own by its name (`RESET`).

        Args:
            name: as `rayos events` shows it, or the name of a QMP event.
            data: fields that the event must have, with their values.

        Raises:
            Timeout_: there was none within `timeout` seconds.
        """
        return self._portal.call(partial(self._inner.wait_for_event, name, timeout=timeout, **data))

    def send_chars(self, text: str) -> None:
        """Types on the keyboard."""
        self._portal.call(partial(self._inner.send_chars, text))

    def send_key(self, combo: str) -> None:
        """Presses keys together, such as `ctrl-alt-delete`."""
        self._portal.call(partial(self._inner.send_key, combo))

    def move_pointer(self, x: float, y: float, *buttons: str) -> None:
        """Moves the tablet to (x, y) in 0..1 with `buttons` held; none releases all."""
        self._portal.call(partial(self._inner.move_pointer, x, y, *buttons))

    def screenshot(self, path: Path | None = None, *, scanout: int = 0, with_cursor: bool = False) -> bytes:
        """Returns a monitor's picture as a PNG; also saved at `path`."""
        return self._portal.call(
            partial(self._inner.screenshot, path, scanout=scanout, with_cursor=with_cursor)
        )

    def wait_damage(self, since: int = 0, *, scanout: int = 0, timeout: float = 60.0) -> Damage:
        """Waits until a monitor's picture changes after serial `since`; what of it did, and the next serial.

        Raises:
            Timeout_: nothing changed within `timeout` seconds.
        """
        return self._portal.call(partial(self._inner.wait_damage, since, scanout=scanout, timeout=timeout))

    def wait_for_screen(
        self, wanted: Wanted, *, region: Region | None = None, scanout: int = 0, timeout: float = 60.0
    ) -> Picture:
        """Waits until the display, or `region` (x, y, width, height) of it, shows `wanted`. That is a picture, the
        path of a PNG that we wrote, a `Picture.sha256`, or a function that says so of a `Picture`. Driven by damage.

        Raises:
            PictureNotSeen: it did not within `timeout` seconds; with the hash of what it showed.
        """
        return self._portal.call(
            partial(self._inner.wait_for_screen, wanted, region=region, scanout=scanout, timeout=timeout)
        )

    def block(self) -> None:
        """Pulls its network cable."""
        self._portal.call(partial(self._inner.block))

    def unblock(self) -> None:
        """Plugs its network cable in again."""
        self._portal.call(partial(self._inner.unblock))

    def qmp(self, command: str, **arguments: Any) -> Any:
        """A QMP command; `_` in an argument's name stands for `-`."""
        return self._portal.call(partial(self._inner.qmp, command, **arguments))

    def stats(self) -> dict[str, Any]:
        """Returns the counters of its devices."""
        return self._portal.call(partial(self._inner.stats))

    def pause(self) -> None:
        """Stops its processors."""
        self._portal.call(partial(self._inner.pause))

    def resume(self) -> None:
        """Lets its processors go on."""
        self._portal.call(partial(self._inner.resume))

    def reset(self) -> None:
        """Presses the reset button."""
        self._portal.call(partial(self._inner.reset))

    def start(self, *, timeout: float = 120.0) -> None:
        """Starts it again after it stopped, and waits until it is ready."""
        self._portal.call(partial(self._inner.start, timeout=timeout))

    def stop(self, *, timeout: float = 20.0) -> VmView:
        """Has the guest power down."""
        return self._portal.call(partial(self._inner.stop, timeout=timeout))

    def kill(self) -> VmView:
        """Ends it at once."""
        return self._portal.call(partial(self._inner.kill))

    def crash(self) -> VmView:
        """As when the power fails: nothing is written any more. `start` boots it again from the same disks."""
        return self._portal.call(partial(self._inner.crash))

    def wait_for_shutdown(self, *, timeout: float = 60.0) -> VmView:
        """Waits until it has ended; `exit_reason` of the view is why."""
        return self._portal.call(partial(self._inner.wait_for_shutdown, timeout=timeout))

    def set_faults(self, device: str, *rules: str, seed: int = 0) -> None:
        """Has a disk or network card fail on purpose, such as `set_faults("disk0", "read:error,sector=128")`; without
        rules it works again. `rayos fault set --help` has the words.
        """
        self._portal.call(partial(self._inner.set_faults, device, *rules, seed=seed))

    def faults(self) -> dict[str, list[dict[str, Any]]]:
        """The faults of each device, with how often each `matched` and was `done`."""
        return self._portal.call(partial(self._inner.faults))

    def kill_worker(self) -> int:
        """Kills its device worker with SIGKILL, as a test of everything above; returns the pid it had."""
        return self._portal.call(partial(self._inner.kill_worker))

    def attach(self) -> str:
        """The commands that get at it by hand while it is there."""
        return self._inner.attach()

    def save_artifacts(self, directory: Path) -> None:
        """Saves consoles, QMP's transcript, state, statistics and the last frame in `directory`. The file
        `attach.txt` has the commands that reach the guest while it is there. For each part that cannot be had the
        reason is saved.
        """
        self._portal.call(partial(self._inner.save_artifacts, directory))


@contextmanager
def open_guest(daemon: PrivateDaemon | None = None, **options: Any) -> Iterator[Guest]:
    """A guest, gone with its disks at the end of the block.

    Args:
        daemon: from `open_private_daemon`; None starts one that ends with the block.
        options: those of `rayos_vmm.testing.open_guest`.

    Raises:
        RayosError: the guest could not be defined or started.
    """
    with ExitStack() as stack:
        chosen = daemon or stack.enter_context(open_private_daemon())
        portal = stack.enter_context(open_portal())
        yield Guest(stack.enter_context(portal.hold(_open_guest(chosen, **options))), portal)

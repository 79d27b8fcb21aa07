"""An attended run: this terminal is the machine's console until the machine ends, and its end is our exit status.

Invariant: the service keeps the machine for as long as we hold it, so however short its life was, every byte of its
console and the reason of its end are there. Whatever ends us (Ctrl-C, SIGTERM, a closed terminal, `kill -9`) ends the
machine; Ctrl-] alone leaves it behind.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import trio

from rayos_vmm.cli import exit_status
from rayos_vmm.cli.console import PORTS, port_number, say_goodbye
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.terminal import Ending, attach
from rayos_vmm.cli.verdict import junit
from rayos_vmm.client.client import Client, NoDaemon
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Conflict, GuestGone, NotFound, RayosError
from rayos_vmm.machine.view import VmState, VmView
from rayos_vmm.shared.console_text import Finder, Folder
from rayos_vmm.shared.tap import Case, TapReader

CLEAN_UP_S: Final = 30.0
OUTPUT_KEPT_CHARACTERS: Final = 1 << 20
_ENDED: Final = (VmState.STOPPED, VmState.FAILED)
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Life:
    """The newest view of a machine that somebody holds; `follow` keeps it so."""

    def __init__(self, views: AsyncIterator[VmView], first: VmView) -> None:
        self._views = views
        self.view = first
        self._begun = trio.Event()
        self._ended = trio.Event()
        self._is_lost = False

    async def follow(self) -> None:
        """Returns when the daemon is gone."""
        async for view in self._views:
            self.view = view
            if view.state is not VmState.DEFINED:
                self._begun.set()
            if view.state in _ENDED and view.started is not None:
                self._ended.set()
        self._is_lost = True
        self._begun.set()
        self._ended.set()

    async def begin(self) -> None:
        """Returns once it starts: what a console says from then on is this run's."""
        await self._begun.wait()

    async def end(self) -> VmView:
        """Its last view, as soon as it has ended.

        Raises:
            NoDaemon: the daemon went away first.
        """
        await self._ended.wait()
        if self._is_lost and self.view.state not in _ENDED:
            raise NoDaemon(
                f"the daemon went away; {self.view.spec.name} goes on",
                hint="`rayos serve` starts another that adopts it",
            )
        return self.view


class Interrupted(Exception):
    """A signal asked us to end; `number` is which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


async def raise_signals() -> None:
    """Raises `Interrupted` at the first signal that asks for our end; never returns."""
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        async for number in signals:
            raise Interrupted(number)


@contextmanager
def interrupt_as_status() -> Iterator[list[int]]:
    """Collects the exit status of a signal, should one end the block."""
    found: list[int] = []
    try:
        yield found
    except* Interrupted as group:
        one: BaseException = group
        while isinstance(one, BaseExceptionGroup):
            one = one.exceptions[0]
        if isinstance(one, Interrupted):
            found.append(128 + one.number)


async def clean_up(client: Client, name: str, *, is_removed: bool) -> None:
    """The machine ends; and is gone, if it is to be removed. Cannot be cancelled."""
    with trio.move_on_after(CLEAN_UP_S, shield=True), suppress(NoDaemon):
        with suppress(Conflict, NotFound):  # it had ended, or is gone
            await client.act(name, "kill")
        if is_removed:
            with suppress(Conflict, NotFound):
                await client.remove(name)


class _Report:
    """The console's text so far, for results and for JUnit."""

    def __init__(self) -> None:
        self._folder = Folder()
        self._line = ""
        self._tap = TapReader()
        self.text = ""

    def feed(self, data: bytes) -> None:
        text = self._folder.feed(data)
        self.text = (self.text + text)[-OUTPUT_KEPT_CHARACTERS:]
        *lines, self._line = (self._line + text).split("\n")
        self._line = self._line[:OUTPUT_KEPT_CHARACTERS]
        for line in lines:
            self._tap.feed(line)

    def cases(self) -> list[Case]:
        if self._line:
            self._tap.feed(self._line)
            self._line = ""
        return self._tap.cases()


class Attended:
    """One attended run, from the moment that the machine runs."""

    def __init__(self, client: Client, spec: VmSpec, args: argparse.Namespace, out: Output) -> None:
        self._client = client
        self._spec = spec
        self._args = args
        self._out = out
        self._report = _Report()
        self._began = time.monotonic()

    async def run(self, life: Life) -> int:
        """The exit status. The machine has ended then, unless somebody detached or --until-text was seen."""
        args, spec = self._args, self._spec
        default = "shell" if spec.is_our_guest else "serial"
        chosen = (
            PORTS[default]
            if args.console is None
            else await port_number(self._client, spec.name, args.console)
        )
        until = Finder([args.until_text]) if args.until_text else None
        ending = Ending.CONSOLE_ENDED
        try:
            async with self._client.console(spec.name, chosen, since=0) as console:
                ending = await attach(
                    console,
                    "Ctrl-] detaches",
                    ends_with_input=spec.is_our_guest,
                    until=until,
                    output_fd=2 if self._out.is_json else 1,
                    on_output=self._report.feed,
                )
        except (Conflict, GuestGone):  # it ended before its console was opened, or while
            if life.view.state not in _ENDED:
                raise
        if ending in (Ending.DETACHED, Ending.TEXT_SEEN):
            await self._leave(ending)
            return 0
        if ending is Ending.INPUT_ENDED:
            if spec.ephemeral:
                await clean_up(self._client, spec.name, is_removed=False)
            return 0
        return await self._end(await life.end())

    async def _leave(self, ending: Ending) -> None:
        name = self._spec.name
        if ending is Ending.DETACHED or not self._spec.ephemeral:
            await self._client.release(name)
        if ending is Ending.DETACHED:
            say_goodbye(name, ending, self._out)
        self._out.result({"name": name, "ending": ending.value, "status": 0}, None)

    async def _end(self, view: VmView) -> int:
        status = exit_status.of_end(view)
        cases = self._report.cases()
        if status == 0 and any(not case.is_ok for case in cases):
            status = 24
        seconds = time.monotonic() - self._began
        if self._args.junit is not None:
            is_good = exit_status.of_end(view) == 0
            written = junit(view, cases, is_good=is_good, seconds=seconds, output=self._report.text)
            await trio.Path(self._args.junit).write_bytes(written)
        self._out.note(f"{self._spec.name} ended: {view.reason}")
        failed = [case for case in cases if not case.is_ok]
        if cases:
            self._out.note(
                f"{len(cases)} tests, {len(failed)} failed" + "".join(f"\n  {one.name}" for one in failed)
            )
        self._out.result(self._summary(view, status, cases, seconds))
        return status

    def _summary(self, view: VmView, status: int, cases: list[Case], seconds: float) -> dict[str, Any]:
        return {
            "name": view.spec.name,
            "status": status,
            "exit_reason": view.exit_reason,
            "reason": view.reason,
            "guest_exit_code": view.guest_exit_code,
            "seconds": round(seconds, 3),
            "cases": [
                {"name": one.name, "ok": one.is_ok, "skipped": one.is_skipped, "message": one.message}
                for one in cases
            ],
            "machine": view,
        }


async def explain_end(client: Client, name: str, error: RayosError, out: Output) -> None:
    """The guest's last lines, before the error that says what became of it."""
    try:
        lines = (await client.console_log(name, PORTS["serial"])).decode(errors="replace").splitlines()
    except RayosError:
        return
    if lines and isinstance(error, GuestGone):
        out.note(f"the last that {name} said on its serial line:")
        for line in lines[-12:]:
            out.note(f"  | {line}")

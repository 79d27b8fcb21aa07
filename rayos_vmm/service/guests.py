"""The operations on a running guest: consoles, keyboard, displays, files, disks, its network card, its TPM.

Each finds the machine and hands it to `guest/`, where the work is done; see `errors.py` for what they raise.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
)
from typing import Any, Final

import trio

from rayos_vmm.config.fault import FaultRule
from rayos_vmm.config.load import Table
from rayos_vmm.config.spec import SNAP_MAXIMUM
from rayos_vmm.errors import GuestGone, one_error
from rayos_vmm.guest import card, consoles, disks, faults
from rayos_vmm.guest.display import MachineDisplay
from rayos_vmm.guest.input import MachineInput
from rayos_vmm.guest.tpm import MachineTpm
from rayos_vmm.guest.view import ConsolePort
from rayos_vmm.machine.agent import Agent
from rayos_vmm.machine.line import SERIAL_PORT
from rayos_vmm.machine.machine import worker_errors
from rayos_vmm.machine.seats import Preference, Seat
from rayos_vmm.machine.view import DiskView, ExecResult, NetView
from rayos_vmm.policy.authority import Authority
from rayos_vmm.policy.capability import Capability
from rayos_vmm.service.registry import Registry
from rayos_vmm.shared.packet import Stats
from rayos_vmm.shared.timed import Span
from rayos_vmm.shared.view import FaultState

#: Its commands come over the console, and its answers go over it.
AGENT_RIGHTS: Final = Capability.CAP_CONSOLE_R | Capability.CAP_CONSOLE_W


class Guests:
    """Every machine's guest, by the machine's name."""

    def __init__(self, registry: Registry, policy: Authority) -> None:
        self._registry = registry
        self._policy = policy

    # Consoles, keyboard, mouse, screen

    async def console_write(self, name: str, port: int, data: bytes) -> None:
        """Types into a console port (31 is the serial line); waits for room.

        Raises:
            NotFound: there is no such port.
        """
        machine = self._registry.find(name)
        self._policy.audit_trail.note_input(name, port, len(data))
        await consoles.console_write(machine, port, data)

    def console_stream(
        self, name: str, port: int, since: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[tuple[int, bytes]]]:
        """(offset, bytes) of a console port: from `since` on, replaying what is kept, or from now on."""
        return consoles.console_stream(self._registry.find(name), port, since)

    def console_seat(
        self, name: str, port: int, who: str, preference: Preference
    ) -> AbstractContextManager[Seat]:
        """A seat at a console port: only its writer may type (`machine/seats.py`)."""
        return self._registry.find(name).seats.open(port, who, preference)

    async def console_ports(self, name: str) -> list[ConsolePort]:
        """Every console port: number, name, whether the guest has it open, size, writer, watchers."""
        return await consoles.console_ports(self._registry.find(name))

    def console_pieces(
        self, name: str, port: int, since: int = 0, *, follow: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[Span]]:
        """Yields the kept output of a console port with the time of each piece; or from there on and on."""
        return consoles.console_pieces(self._registry.find(name), port, since, follow=follow)

    async def console_resize(self, name: str, port: int, columns: int, rows: int) -> None:
        """Tells the guest the size of its terminal; a line of the board has no way to."""
        machine = self._registry.find(name)
        if port < SERIAL_PORT:
            with worker_errors(machine):
                await machine.need_worker().console_resize(port, columns, rows)

    def input(self, name: str) -> MachineInput:
        """A machine's keyboard, mouse, tablet and touch screen, to be used.

        Raises:
            NotFound: there is no machine of that name.
        """
        return MachineInput(
            self._registry.find(name),
            lambda: self._policy.need(name, Capability.CAP_INPUT, "typing and pointing"),
        )

    async def set_faults(self, name: str, device: str, rules: Sequence[FaultRule], seed: int) -> None:
        """Has things go wrong in a disk or network card from now on; see `guest.faults.set_faults`."""
        await faults.set_faults(self._registry.find(name), device, rules, seed)

    async def faults(self, name: str) -> dict[str, list[FaultState]]:
        """Returns the faults set on purpose, device by device, and how often each struck."""
        return await faults.faults(self._registry.find(name))

    def display(self, name: str) -> MachineDisplay:
        """A machine's monitors, to be looked at.

        Raises:
            NotFound: there is no machine of that name.
        """
        return MachineDisplay(self._registry.find(name))

    # Inside and underneath

    async def qmp(self, name: str, command: str, arguments: Table | None = None) -> Any:
        """Executes a QMP command and returns QEMU's answer.

        Raises:
            QmpRefused: QEMU said no.
        """
        return await self._registry.find(name).need_qmp().execute(command, arguments)

    async def qmp_transcript(self, name: str) -> str:
        """The last of what was said over QMP in this run, one JSON object a line; also after its end."""
        return self._registry.find(name).transcript.text()

    async def exec(self, name: str, command: str | Sequence[str], timeout_s: float = 60.0) -> ExecResult:
        """Runs a command in the guest by its agent: a shell line, or a program with its arguments.

        Raises:
            GuestGone: the guest has no agent, or it went away.
            Timeout_: it did not end in time; it was killed.
        """
        async with self.agent(name) as agent:
            return await agent.run_command(command, timeout_s=timeout_s)

    async def read_file(self, name: str, path: str) -> bytes:
        """A file of the guest."""
        async with self.agent(name) as agent:
            return await agent.read_file(path)

    async def write_file(self, name: str, path: str, data: bytes, mode: int = 0o644) -> None:
        """Makes or replaces a file in the guest."""
        async with self.agent(name) as agent:
            await agent.write_file(path, data, mode)

    async def stats(self, name: str) -> Stats:
        """Returns the counters of the machine's devices."""
        machine = self._registry.find(name)
        if not machine.is_live and (last := machine.remains.stats()) is not None:
            return dict(last)
        async with machine.alive():
            return await machine.need_worker().stats()

    # Disks, the network card, the TPM

    async def disks(self, name: str) -> list[DiskView]:
        """The machine's disks."""
        machine = self._registry.find(name)
        count = len(machine.record.spec.disks)
        return await trio.to_thread.run_sync(lambda: [disks.view(machine, index) for index in range(count)])

    async def resize_disk(self, name: str, index: int, size_bytes: int) -> DiskView:
        """Makes a disk larger, also while the guest runs.

        Raises:
            NotFound: there is no such disk.
            Invalid: smaller than it is, beyond the quota, read-only, or no file that can grow.
        """
        machine = self._registry.find(name)
        async with machine.lock:
            await disks.resize(machine, index, size_bytes)
            await self._registry.save(machine)
            return disks.view(machine, index)

    async def net(self, name: str) -> NetView:
        """The machine's network card.

        Raises:
            NotFound: it has none.
        """
        return await card.view(self._registry.find(name))

    async def set_link(self, name: str, is_up: bool) -> NetView:
        """Plugs the card's cable in, or pulls it.

        Raises:
            NotFound: it has no card.
        """
        machine = self._registry.find(name)
        await card.set_link(machine, is_up=is_up)
        await self._registry.save(machine)
        return await card.view(machine)

    def capture(
        self, name: str, snap: int = SNAP_MAXIMUM, count: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """A pcapng file of what passes the card, live, in pieces; close it with `aclosing`.

        Raises:
            NotFound: it has no card.
            Invalid: another capture runs.
        """
        return card.capture(self._registry.find(name), snap=snap, count=count)

    async def announce(self, name: str) -> None:
        """Has the guest announce its addresses.

        Raises:
            NotFound: it has no card.
        """
        await card.announce(self._registry.find(name))

    def tpm(self, name: str) -> MachineTpm:
        """A machine's TPM, to be asked.

        Raises:
            NotFound: there is no machine of that name.
        """
        return MachineTpm(self._registry.find(name))

    @asynccontextmanager
    async def agent(self, name: str) -> AsyncIterator[Agent]:
        """The agent of a guest, for as long as the guest may speak with it.

        Raises:
            Forbidden: the machine does not have the rights to its console, or loses one meanwhile.
            GuestGone: it has no agent.
        """
        machine = self._registry.find(name)
        async with machine.alive():
            machine.need_qmp()
            if machine.agent is None:
                raise GuestGone(f"{name} has no agent", hint="the agent is part of RayOS's own guest")
            self._policy.need(name, AGENT_RIGHTS, "the guest's agent")
            with one_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._policy.watch, name, AGENT_RIGHTS, "the guest's agent")
                    yield machine.agent
                    nursery.cancel_scope.cancel()

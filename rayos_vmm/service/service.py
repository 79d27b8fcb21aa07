"""The service: every operation that a front end can ask for, in one class.

The API layer translates HTTP to these calls and nothing else; see `errors.py` for what they raise. Invariant:
killing this process kills no guest; the next service finds them in the store and takes them over.
"""

from __future__ import annotations

import builtins
import logging
import shutil
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    aclosing,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from importlib.metadata import version
from typing import Any, Final, Literal

import msgspec
import trio

from rayos_vmm.config.fault import FaultRule
from rayos_vmm.config.firewall import FirewallConfig
from rayos_vmm.config.host import check_host, check_shape, read_host
from rayos_vmm.config.settings import AuditConfig, ServiceConfig
from rayos_vmm.config.spec import SNAP_MAXIMUM, Net, VmSpec, is_name
from rayos_vmm.errors import Conflict, GuestGone, Invalid, NotFound, RayosError, Timeout_, one_error
from rayos_vmm.events import Event, EventLog
from rayos_vmm.guest import card, consoles, disks, faults
from rayos_vmm.guest.accounts import MachineAccounts
from rayos_vmm.guest.display import MachineDisplay
from rayos_vmm.guest.input import MachineInput
from rayos_vmm.guest.tpm import MachineTpm
from rayos_vmm.hardware.protocols import Hardware
from rayos_vmm.machine.agent import Agent
from rayos_vmm.machine.build import Dependencies, end_orphans, orphans
from rayos_vmm.machine.lifecycle import LifeEvent
from rayos_vmm.machine.line import SERIAL_PORT
from rayos_vmm.machine.machine import Machine, worker_errors
from rayos_vmm.machine.record import Record
from rayos_vmm.machine.run import adopt_machine, run_machine
from rayos_vmm.machine.seats import Preference, Seat
from rayos_vmm.machine.verdict import Verdict
from rayos_vmm.machine.view import DiskView, ExecResult, ExitReason, NetView, VmState, VmView
from rayos_vmm.network.local import follow_addresses
from rayos_vmm.paths import Paths
from rayos_vmm.policy.capability import Capability
from rayos_vmm.policy.hierarchy import Place
from rayos_vmm.qemu.arch import architecture_of, check_board
from rayos_vmm.service.connections import ConnectionCounts
from rayos_vmm.service.open import Parts, open_parts
from rayos_vmm.service.workers import Workers
from rayos_vmm.shared.timed import Span

Condition = Literal["ready", "running", "stopped"]
STOP_TIMEOUT_S: Final = 20.0
#: Its commands come over the console, and its answers go over it.
AGENT_RIGHTS: Final = Capability.CAP_CONSOLE_R | Capability.CAP_CONSOLE_W
_END_TIMEOUT_S: Final = 20.0
#: A healthy guest is adopted in less, so that nobody who asks at once meets it half adopted.
ADOPTION_GRACE_S: Final = 0.5
LOG: Final = logging.getLogger(__name__)
_Life = Callable[[Machine, Dependencies], Awaitable[None]]


class Service:
    """Use `open_service`. Every method may be called from any trio task of the same run."""

    def __init__(
        self, parts: Parts, dependencies: Dependencies, jobs: trio.MemorySendChannel[tuple[_Life, Machine]]
    ) -> None:
        self._parts = parts
        self._dependencies = dependencies
        self._jobs = jobs
        self._events = parts.events
        self._machines: dict[str, Machine] = {}
        self._clients = 0
        self._activity = trio.Event()
        self._started = time.monotonic()
        self.workers = Workers(self.machines, self._machine, parts.events)
        self.policy = parts.authority
        self.revisions = parts.revisions
        self.firewall = parts.firewall
        self.event_counts = parts.events.counts
        self.accounts = MachineAccounts(self.machines, self._machine, self._save, self.policy.cap)
        self.firewall.save = self._save_firewall
        self.gatekeeper = parts.gatekeeper
        self.connections = ConnectionCounts()

    # What there is

    async def info(self) -> dict[str, Any]:
        """The service, its QEMU, accelerator and network; may download QEMU the first time."""
        return {
            "version": version("rayos-vmm"),
            **await self._parts.platform.describe(),
            **self._parts.network_info(),
            "uptime_s": round(time.monotonic() - self._started, 3),
            "compiled": is_compiled(),
            "runtime": str(self._parts.paths.runtime),
            "state": str(self._parts.paths.state),
        }

    async def get(self, name: str) -> VmView:
        """One machine as it is now.

        Raises:
            NotFound: there is none of that name.
        """
        return self._machine(name).view()

    async def list(self) -> builtins.list[VmView]:
        """All machines, by name."""
        return [self._machines[name].view() for name in sorted(self._machines)]

    # Life cycle

    async def define(self, spec: VmSpec) -> VmView:
        """Records a machine; nothing of it runs yet.

        Raises:
            Conflict: the name is taken.
            Invalid: it makes no sense, or does not fit this host.
        """
        if spec.name in self._machines:
            state = self._machines[spec.name].state
            raise Conflict(
                f"there is a machine {spec.name} already ({state})",
                hint=f"choose another name, or remove it: rayos rm {spec.name}",
            )
        check_shape(spec)
        check_board(spec)
        Verdict(spec)  # are its patterns patterns?
        self.firewall.check(spec.firewall)
        self._check_arguments(spec)
        notes = await trio.to_thread.run_sync(
            lambda: check_host(spec, read_host(), is_strict=not self._dependencies.overcommit)
        )
        if spec.name in self._machines:
            raise Conflict(f"there is a machine {spec.name} already")
        machine = self._add(Record(spec=spec, uuid=str(uuid.uuid4()), notes=notes))
        try:
            await self.policy.define(spec.name, spec.capabilities, Place(spec.zone, spec.parent))
            await self._parts.store.save(machine.record)
        except BaseException:
            del self._machines[spec.name]
            self.firewall.forget(spec.name)
            raise
        self._events.publish("vm.state", spec.name, state=VmState.DEFINED.value)
        return machine.view()

    def _check_arguments(self, spec: VmSpec) -> None:
        if spec.qemu_arguments and not self._dependencies.takes_qemu_arguments:
            raise Invalid(
                f"qemu_arguments = {list(spec.qemu_arguments)}: this service allows none",
                hint="[service] qemu_arguments = true allows them",
                code="forbidden",
            )

    async def start(self, name: str) -> VmView:
        """Returns once the machine runs (its devices are up and QEMU continued), not when it is ready.

        Raises:
            NotFound: there is none of that name.
            Conflict: it is running already.
            Invalid: a file is missing or of no use, or the host lacks memory.
            Busy: a tap, a disk or a subnet is in use.
            GuestGone: QEMU, the TPM or a device did not start.
        """
        machine = self._machine(name)
        async with machine.lock:
            self._check_disks_are_free(machine)
            machine.begin(trio.current_time(), time.time())
            await self._parts.store.save(machine.record)
            await self._jobs.send((run_machine, machine))
            self._notice()
        while machine.state is VmState.STARTING:
            await machine.wait_changed()
        if not machine.has_run:
            raise machine.start_error or GuestGone(f"{name} was stopped while it was starting")
        await self._parts.store.save(machine.record)  # before anybody is told that it runs
        return machine.view()

    async def stop(self, name: str, timeout_s: float = STOP_TIMEOUT_S) -> VmView:
        """Asks the guest to power down, by ACPI and by our agent; after `timeout_s` pulls the plug.

        Raises:
            Conflict: it is not running.
        """
        machine = self._machine(name)
        machine.apply(LifeEvent.STOP)
        machine.evidence.asked = machine.evidence.asked or ExitReason.STOPPED
        machine.start_scope.cancel()
        with trio.move_on_after(timeout_s):
            await self._ask_to_power_down(machine)
            await self._wait_end(machine)
            return machine.view()
        machine.evidence.asked = ExitReason.KILLED
        return await self._end(machine)

    async def kill(self, name: str) -> VmView:
        """Pulls the plug.

        Raises:
            Conflict: it is not running.
        """
        machine = self._machine(name)
        machine.apply(LifeEvent.STOP)
        machine.evidence.asked = ExitReason.KILLED
        machine.start_scope.cancel()
        return await self._end(machine)

    async def pause(self, name: str) -> VmView:
        """Stops the guest's processors; the guest does not notice.

        Raises:
            Conflict: it is not running.
        """
        machine = self._machine(name)
        await machine.need_qmp().execute("stop")
        if machine.state is VmState.RUNNING:
            machine.apply(LifeEvent.PAUSE)
        return machine.view()

    async def resume(self, name: str) -> VmView:
        """Lets a paused guest go on.

        Raises:
            Conflict: it is not running.
        """
        machine = self._machine(name)
        await machine.need_qmp().execute("cont")
        if machine.state is VmState.PAUSED:
            machine.apply(LifeEvent.RUN)
        return machine.view()

    async def reset(self, name: str) -> VmView:
        """Presses the reset button.

        Raises:
            Conflict: it is not running.
        """
        machine = self._machine(name)
        qmp = machine.need_qmp()
        machine.forget_ready()
        await qmp.execute("system_reset")
        return machine.view()

    async def remove(self, name: str) -> None:
        """Forgets a machine and deletes its own disks, TPM and logs.

        Raises:
            Conflict: it is running.
        """
        machine = self._machine(name)
        async with machine.lock:
            if machine.is_live:
                raise Conflict(f"{name} is {machine.state.value}", hint=f"stop it first: rayos stop {name}")
            self.policy.book.check_leave(name)
            if machine.unreadable:
                await end_orphans(machine)
                await trio.to_thread.run_sync(lambda: shutil.rmtree(machine.runtime, ignore_errors=True))
            await self._forget(machine)

    async def wait(self, name: str, condition: Condition, timeout_s: float = 60.0) -> VmView:
        """Returns when the machine is ready, running or stopped (which includes failed).

        Raises:
            GuestGone: it ended, so that it will not get there.
            Timeout_: it did not get there in time.
        """
        machine = self._machine(name)
        with trio.move_on_after(timeout_s):
            while not self._holds(machine, condition):
                if condition != "stopped" and not machine.is_live and machine.state is not VmState.DEFINED:
                    raise GuestGone(f"{name} is {machine.state.value}: {machine.record.reason}")
                await machine.wait_changed()
            return machine.view()
        raise Timeout_(f"{name} is {machine.state.value}, and was not {condition} within {timeout_s:g} s")

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[AsyncIterator[VmView]]:
        """The machine as it is now and after each change, without end; it is not forgotten while the block runs.

        An ephemeral machine lives no longer than its last holder: it is killed if it runs then, and forgotten.

        Raises:
            NotFound: there is none of that name.
        """
        machine = self._machine(name)
        machine.holders += 1
        try:
            async with aclosing(self._views(machine)) as views:
                yield views
        finally:
            machine.holders -= 1
            is_let_go = machine.is_live and machine.is_released
            if machine.record.spec.ephemeral and not machine.holders and not is_let_go:
                with trio.move_on_after(_END_TIMEOUT_S, shield=True), suppress(RayosError):
                    await self._abandon(machine)

    async def release(self, name: str) -> None:
        """Lets a machine live on without its holders, as if it had been started without any."""
        self._machine(name).is_released = True

    async def _views(self, machine: Machine) -> AsyncGenerator[VmView, None]:
        last = None
        while True:
            view = machine.view()
            if view != last:
                last = view
                yield view
            else:
                await machine.wait_changed()

    async def _abandon(self, machine: Machine) -> None:
        if machine.is_live:
            await self.kill(machine.name)  # `_live` forgets it then
        elif self._machines.get(machine.name) is machine:
            await self._forget(machine)

    # The guest's seat: consoles, keyboard, mouse, screen

    async def console_write(self, name: str, port: int, data: bytes) -> None:
        """Types into a console port (31 is the serial line); waits for room.

        Raises:
            NotFound: there is no such port.
        """
        machine = self._machine(name)
        self.policy.audit_trail.note_input(name, port, len(data))
        await consoles.console_write(machine, port, data)

    def console_stream(
        self, name: str, port: int, since: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[tuple[int, bytes]]]:
        """(offset, bytes) of a console port: from `since` on, replaying what is kept, or from now on."""
        return consoles.console_stream(self._machine(name), port, since)

    def console_seat(
        self, name: str, port: int, who: str, preference: Preference
    ) -> AbstractContextManager[Seat]:
        """A seat at a console port: only its writer may type (`machine/seats.py`)."""
        return self._machine(name).seats.open(port, who, preference)

    async def console_ports(self, name: str) -> builtins.list[dict[str, Any]]:
        """Every console port: number, name, whether the guest has it open, size, writer, watchers."""
        return await consoles.console_ports(self._machine(name))

    def console_pieces(
        self, name: str, port: int, since: int = 0, *, follow: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[Span]]:
        """Yields the kept output of a console port with the time of each piece; or from there on and on."""
        return consoles.console_pieces(self._machine(name), port, since, follow=follow)

    async def console_resize(self, name: str, port: int, columns: int, rows: int) -> None:
        """Tells the guest the size of its terminal; a line of the board has no way to."""
        machine = self._machine(name)
        if port < SERIAL_PORT:
            with worker_errors(machine):
                await machine.need_worker().console_resize(port, columns, rows)

    def input(self, name: str) -> MachineInput:
        """A machine's keyboard, mouse, tablet and touch screen, to be used.

        Raises:
            NotFound: there is no machine of that name.
        """
        return MachineInput(self._machine(name))

    async def set_faults(self, name: str, device: str, rules: Sequence[FaultRule], seed: int) -> None:
        """Has things go wrong in a disk or network card from now on; see `vm.faults.set_faults`."""
        await faults.set_faults(self._machine(name), device, rules, seed)

    async def faults(self, name: str) -> dict[str, builtins.list[dict[str, Any]]]:
        """Returns the faults set on purpose, device by device, and how often each struck."""
        return await faults.faults(self._machine(name))

    def display(self, name: str) -> MachineDisplay:
        """A machine's monitors, to be looked at.

        Raises:
            NotFound: there is no machine of that name.
        """
        return MachineDisplay(self._machine(name))

    # Inside and underneath

    async def qmp(self, name: str, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Executes a QMP command and returns QEMU's answer.

        Raises:
            QmpRefused: QEMU said no.
        """
        return await self._machine(name).need_qmp().execute(command, arguments)

    async def qmp_transcript(self, name: str) -> str:
        """The last of what was said over QMP in this run, one JSON object a line; also after its end."""
        return self._machine(name).transcript.text()

    async def exec(self, name: str, command: str | Sequence[str], timeout_s: float = 60.0) -> ExecResult:
        """Runs a command in the guest by its agent: a shell line, or a program with its arguments.

        Raises:
            GuestGone: the guest has no agent, or it went away.
            Timeout_: it did not end in time; it was killed.
        """
        async with self._agent(name) as agent:
            return await agent.run_command(command, timeout_s=timeout_s)

    async def read_file(self, name: str, path: str) -> bytes:
        """A file of the guest."""
        async with self._agent(name) as agent:
            return await agent.read_file(path)

    async def write_file(self, name: str, path: str, data: bytes, mode: int = 0o644) -> None:
        """Makes or replaces a file in the guest."""
        async with self._agent(name) as agent:
            await agent.write_file(path, data, mode)

    async def stats(self, name: str) -> dict[str, Any]:
        """Returns the counters of the machine's devices."""
        machine = self._machine(name)
        if not machine.is_live and (last := machine.remains.stats()) is not None:
            return dict(last)
        async with machine.alive():
            return await machine.need_worker().stats()

    # Disks

    async def disks(self, name: str) -> builtins.list[DiskView]:
        """The machine's disks."""
        machine = self._machine(name)
        count = len(machine.record.spec.disks)
        return await trio.to_thread.run_sync(lambda: [disks.view(machine, index) for index in range(count)])

    async def resize_disk(self, name: str, index: int, size_bytes: int) -> DiskView:
        """Makes a disk larger, also while the guest runs.

        Raises:
            NotFound: there is no such disk.
            Invalid: smaller than it is, beyond the quota, read-only, or no file that can grow.
        """
        machine = self._machine(name)
        async with machine.lock:
            await disks.resize(machine, index, size_bytes)
            await self._parts.store.save(machine.record)
            return disks.view(machine, index)

    # The network card

    async def net(self, name: str) -> NetView:
        """The machine's network card.

        Raises:
            NotFound: it has none.
        """
        return await card.view(self._machine(name))

    async def set_link(self, name: str, is_up: bool) -> NetView:
        """Plugs the card's cable in, or pulls it.

        Raises:
            NotFound: it has no card.
        """
        machine = self._machine(name)
        await card.set_link(machine, is_up=is_up)
        await self._parts.store.save(machine.record)
        return await card.view(machine)

    def capture(
        self, name: str, snap: int = SNAP_MAXIMUM, count: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """A pcapng file of what passes the card, live, in pieces; close it with `aclosing`.

        Raises:
            NotFound: it has no card.
            Invalid: another capture runs.
        """
        return card.capture(self._machine(name), snap=snap, count=count)

    async def announce(self, name: str) -> None:
        """Has the guest announce its addresses.

        Raises:
            NotFound: it has no card.
        """
        await card.announce(self._machine(name))

    def tpm(self, name: str) -> MachineTpm:
        """A machine's TPM, to be asked.

        Raises:
            NotFound: there is no machine of that name.
        """
        return MachineTpm(self._machine(name))

    async def leases(self) -> builtins.list[dict[str, Any]]:
        """The addresses that our DHCP gave out."""
        return await self._parts.leases()

    async def dhcp_status(self) -> dict[str, Any]:
        """Our DHCP server: its link and subnet, or why it does not serve; leases by state; counters."""
        return self._parts.network.dhcp_status()

    async def dhcp_logs(self, name: str | None = None) -> dict[str, Any]:
        """The last exchanges of our DHCP server, and the last transactions of the machines' upstream clients.

        Raises:
            NotFound: there is no machine of that name.
        """
        network = self._parts.network
        exchanges, histories = network.exchanges(), network.upstreams.histories()
        if name is not None:
            record = self._machine(name).record
            exchanges = [
                one for one in exchanges if one["port"] == record.live.tap or one["mac"] == record.mac
            ]
            histories = {vm: kept for vm, kept in histories.items() if vm == name}
        return {"server": exchanges, "clients": histories}

    async def renew_lease(self, name: str) -> None:
        """Renews the lease that a machine has upstream, now rather than at half time.

        Raises:
            NotFound: there is no machine of that name.
            Conflict: it has no upstream address.
        """
        self._machine(name)
        self._parts.network.upstreams.renew(name)

    async def release_lease(self, address: str) -> None:
        """Takes a lease back; its guest is refused when it renews, and asks anew.

        Raises:
            Invalid: that is no address.
            NotFound: nobody has a lease for it.
            Busy: our DHCP server does not run.
        """
        self._parts.network.release(address)

    def events(self, since: int | None = None) -> AsyncGenerator[Event, None]:
        """From event `since`+1 on, then live and without end; None = from now. Close it with `aclosing`."""
        return self._events.follow(since)

    # Idle exit

    @contextmanager
    def client(self) -> Iterator[None]:
        """Held by the API around every request and stream, so that the daemon is not taken for idle."""
        self._clients += 1
        self._notice()
        try:
            yield
        finally:
            self._clients -= 1
            self._notice()

    async def wait_idle(self, seconds: float) -> None:
        """Returns once no machine has been running and no client there for `seconds` on end."""
        while True:
            activity = self._activity
            if self._clients or any(machine.is_live for machine in self._machines.values()):
                await activity.wait()
                continue
            with trio.move_on_after(seconds):
                await activity.wait()
                continue
            return

    # Inner workings

    def note_lease(self, mac: str, address: str, is_bound: bool) -> None:
        """DHCP gave an address to a card, or took it back: it is the address of the machine that has it."""
        if not is_bound:
            self.firewall.unbind(mac, address)
            return
        self.firewall.bind(mac, address)
        for machine in self._machines.values():
            if machine.is_live and machine.record.mac == mac and machine.record.address != address:
                machine.record.address = address
                machine.wake()

    def machines_by_mac(self) -> dict[str, str]:
        """The name of the machine that has a card, by its MAC."""
        return {one.record.mac: one.name for one in self._machines.values() if one.record.mac}

    def machines(self) -> builtins.list[Machine]:
        """All machines as they are, by name."""
        return [self._machines[name] for name in sorted(self._machines)]

    async def _save(self, machine: Machine) -> None:
        await self._parts.store.save(machine.record)

    def _notice(self) -> None:
        activity, self._activity = self._activity, trio.Event()
        activity.set()

    def _machine(self, name: str) -> Machine:
        try:
            return self._machines[name]
        except KeyError:
            known = ", ".join(sorted(self._machines)) or "none"
            raise NotFound(f"there is no machine {name!r}; known: {known}") from None

    def _add(self, record: Record) -> Machine:
        name, paths = record.spec.name, self._parts.paths
        machine = Machine(record, self._events, runtime=paths.vm_runtime(name), state=paths.vm_state(name))
        self._machines[name] = machine
        machine.recall()
        if record.spec.net.enabled:
            mac = record.spec.net.mac or self._parts.network.mac(name)
            is_upstream = record.spec.net.address == "upstream"
            self.firewall.define(name, record.spec.firewall, mac, is_upstream=is_upstream)
        return machine

    async def _save_firewall(self, name: str, config: FirewallConfig) -> None:
        machine = self._machine(name)
        machine.record.spec = msgspec.structs.replace(machine.record.spec, firewall=config)
        await self._parts.store.save(machine.record)

    @asynccontextmanager
    async def _agent(self, name: str) -> AsyncIterator[Agent]:
        """The agent of a guest, for as long as the guest may speak with it.

        Raises:
            Forbidden: the machine does not have the rights to its console, or loses one meanwhile.
            GuestGone: it has no agent.
        """
        machine = self._machine(name)
        async with machine.alive():
            machine.need_qmp()
            if machine.agent is None:
                raise GuestGone(f"{name} has no agent", hint="the agent is part of RayOS's own guest")
            self.policy.need(name, AGENT_RIGHTS, "the guest's agent")
            with one_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.policy.watch, name, AGENT_RIGHTS, "the guest's agent")
                    yield machine.agent
                    nursery.cancel_scope.cancel()

    def _check_disks_are_free(self, machine: Machine) -> None:
        disks = machine.record.spec.disks
        wanted = {disk.path: disk.read_only for disk in disks if disk.path and not disk.snapshot}
        for other in self._machines.values():
            if other is machine or not other.is_live:
                continue
            for disk in other.record.spec.disks:
                if disk.snapshot or disk.path not in wanted:
                    continue
                if not (disk.read_only and wanted[disk.path]):
                    raise Conflict(f"disk {disk.path} is in use by machine {other.name}", code="busy")

    async def _ask_to_power_down(self, machine: Machine) -> None:
        with suppress(RayosError):
            qmp = machine.need_qmp()
            if not (await qmp.execute("query-status"))["running"]:
                await qmp.execute("cont")
            if architecture_of(machine.record.spec).has_power_button:
                await qmp.execute("system_powerdown")
            if machine.agent is not None and machine.record.is_ready:
                async with self._agent(machine.name) as agent:
                    await agent.power_off()

    async def _end(self, machine: Machine) -> VmView:
        if machine.process is not None:
            machine.process.signal(9)
        with trio.move_on_after(_END_TIMEOUT_S):
            await self._wait_end(machine)
            return machine.view()
        raise Timeout_(f"{machine.name} did not end within {_END_TIMEOUT_S:g} s of being killed")

    async def _wait_end(self, machine: Machine) -> None:
        while not self._is_over(machine):
            await machine.wait_changed()

    def _is_over(self, machine: Machine) -> bool:
        """True when it has ended and, if it was ephemeral and nobody holds it, nothing of it is left."""
        is_forgotten = self._machines.get(machine.name) is not machine
        return not machine.is_live and (
            is_forgotten or not machine.record.spec.ephemeral or machine.holders > 0
        )

    def _holds(self, machine: Machine, condition: Condition) -> bool:
        match condition:
            case "ready":
                return machine.state is VmState.RUNNING and machine.record.is_ready
            case "running":
                return machine.state is VmState.RUNNING
            case "stopped":
                return self._is_over(machine)
            case _:
                raise Invalid(f"condition {condition!r}; allowed are ready, running, stopped")

    async def _forget(self, machine: Machine) -> None:
        await self._parts.store.delete(machine.name)
        await self.policy.forget(machine.name)
        if machine.record.mac:
            self._parts.network.forget(machine.record.mac)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(machine.state_directory, ignore_errors=True))
        self._machines.pop(machine.name, None)
        self.firewall.forget(machine.name)
        self._events.publish("vm.removed", machine.name)
        machine.wake()

    async def _live(self, life: _Life, machine: Machine) -> None:
        """One machine's task: its life, and what is left to do after it."""
        await life(machine, self._dependencies)
        if machine.record.spec.ephemeral and not machine.holders:
            await self._forget(machine)
        self._notice()

    async def run_jobs(self, jobs: trio.MemoryReceiveChannel[tuple[_Life, Machine]]) -> None:
        """The task under which all machines live; ends when cancelled."""
        async with trio.open_nursery() as nursery:
            async for life, machine in jobs:
                nursery.start_soon(self._live, life, machine)

    async def load(self) -> None:
        """Knows the machines of a former daemon, and begins to take over those that live."""
        records, unreadable = await self._parts.store.load()
        for record in records:
            self._add(record)
        for name, why in unreadable.items():
            self._add_unreadable(name, f"its record cannot be read: {why}")
        machines = self.machines()
        await self.policy.forget_ghosts(self._machines)
        self.policy.place({machine.name: machine.record.spec for machine in machines})
        for machine in machines:
            await self.policy.adopt(machine.name, machine.record.spec.capabilities)
        await self._list_unrecorded()
        for machine in machines:
            if machine.is_live:
                await self._jobs.send((adopt_machine, machine))

    async def adopt_networks(self) -> None:
        """Gives every machine that was adopted its addresses back; ends when none is left that is adopting."""
        async with trio.open_nursery() as nursery:
            for machine in [machine for machine in self.machines() if machine.is_live]:
                nursery.start_soon(self._adopt_network, machine)
        # An address may have been given after the record was saved; the leases were written before the guest knew.
        for lease in await self._parts.leases():
            if lease["state"] == "bound":
                self.note_lease(lease["mac"], lease["address"], True)

    async def _adopt_network(self, machine: Machine) -> None:
        bridge, record = machine.record.spec.net.bridge, machine.record
        if bridge is not None and record.live.tap and record.mac:
            await machine.attached.wait()
            if machine.is_live:
                await self._parts.network.adopt(machine.name, record.live.tap, record.mac, bridge)

    async def wait_adopted(self, limit_s: float) -> None:
        """Returns when every machine is looked after, or has ended; at the latest after `limit_s`."""
        with trio.move_on_after(limit_s):
            for machine in self.machines():
                if machine.is_live:
                    await machine.attached.wait()

    def _add_unreadable(self, name: str, why: str) -> None:
        """A name that stands for what is left of a machine: it can be seen and removed, and not started."""
        spec = VmSpec(name=name, net=Net(enabled=False), capabilities=())
        machine = self._add(Record(spec=spec, uuid="", state=VmState.FAILED, reason=why))
        machine.unreadable, machine.record.exit_reason = why, ExitReason.LOST
        LOG.error("a machine's record is of no use", extra={"vm": name, "why": why})
        self._events.publish("vm.state", name, state=VmState.FAILED.value, reason=why)

    async def _list_unrecorded(self) -> None:
        """Finds processes of machines that have no record: nobody looks after them, and nobody else would name them."""
        for directory in sorted((self._parts.paths.runtime / "vm").iterdir()):
            machine = self._machines.get(directory.name)
            if not is_name(directory.name) or (machine is not None and not machine.unreadable):
                continue
            found = await trio.to_thread.run_sync(
                orphans, directory, self._parts.paths.vm_state(directory.name)
            )
            if not found:
                continue
            pids = sorted(process.pid for process in found)
            why = f"it runs without a record (processes {', '.join(map(str, pids))})"
            if machine is None:
                self._add_unreadable(directory.name, why)
            else:
                machine.unreadable = machine.record.reason = f"{machine.unreadable}; {why}"
            self._events.publish("vm.unrecorded", directory.name, pids=pids)


def is_compiled() -> bool:
    """True when the device code runs as compiled extension modules."""
    import rayos_devices.virtio.vring as module

    return not str(module.__file__).endswith(".py")


@asynccontextmanager
async def open_service(
    config: ServiceConfig,
    paths: Paths,
    *,
    hardware: Hardware | None = None,
    events: EventLog | None = None,
    audit: AuditConfig | None = None,
) -> AsyncIterator[Service]:
    """The running service. Leaving it stops our part (DHCP, supervision) and leaves the guests running.

    Args:
        hardware: what machines get as devices; None for our own.

    Raises:
        Busy: another daemon owns the runtime directory.
        RayosError: the store or the network cannot be opened.
    """
    async with open_parts(
        config, paths, hardware=hardware, events=events or EventLog(), audit=audit or AuditConfig()
    ) as parts:

        async def save(machine: Machine) -> None:
            await parts.store.save(machine.record)

        dependencies = Dependencies(
            hardware=parts.hardware,
            platform=parts.platform,
            network=parts.network,
            tpms=parts.tpms,
            save=save,
            start_timeout_s=config.start_timeout_s,
            overcommit=config.overcommit,
            takes_qemu_arguments=config.qemu_arguments,
        )
        send, receive = trio.open_memory_channel[tuple[_Life, Machine]](0)
        service = Service(parts, dependencies, send)
        service.workers.switch(config.balance)
        parts.network.on_lease(service.note_lease, machines=service.machines_by_mac)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run_jobs, receive)
            nursery.start_soon(service.firewall.run)
            nursery.start_soon(follow_addresses, service.firewall.host_changed)
            nursery.start_soon(service.workers.run)
            await service.load()
            nursery.start_soon(service.adopt_networks)
            await service.wait_adopted(ADOPTION_GRACE_S)
            yield service
            nursery.cancel_scope.cancel()

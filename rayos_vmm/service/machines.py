"""The life of machines: defined, started, stopped, removed, and taken over from a former service.

Invariant: killing this process kills no guest; the next service finds them in the store and takes them over.
"""

from __future__ import annotations

import builtins
import logging
import shutil
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import (
    aclosing,
    asynccontextmanager,
    suppress,
)
from typing import Final, Literal

import trio

from rayos_vmm.config.host import check_host, check_shape, read_host
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Conflict, GuestGone, Invalid, NotFound, RayosError, Timeout_
from rayos_vmm.events import EventLog
from rayos_vmm.machine.build import Dependencies, end_orphans
from rayos_vmm.machine.lifecycle import LifeEvent
from rayos_vmm.machine.machine import Machine
from rayos_vmm.machine.record import Record
from rayos_vmm.machine.run import adopt_machine, run_machine
from rayos_vmm.machine.verdict import Verdict
from rayos_vmm.machine.view import ExitReason, VmState, VmView
from rayos_vmm.network.bridge import HostNetwork
from rayos_vmm.network.firewall import Firewall
from rayos_vmm.policy.authority import Authority
from rayos_vmm.policy.hierarchy import Place
from rayos_vmm.qemu.arch import architecture_of, check_board
from rayos_vmm.service.dhcp import LeaseListener
from rayos_vmm.service.guests import Guests
from rayos_vmm.service.registry import Registry

Condition = Literal["ready", "running", "stopped"]
STOP_TIMEOUT_S: Final = 20.0
_END_TIMEOUT_S: Final = 20.0
LOG: Final = logging.getLogger(__name__)
_Life = Callable[[Machine, Dependencies], Awaitable[None]]


class Machines:
    """Every method may be called from any trio task of the same run.

    `nursery` is where machines live: its end leaves their guests running. `notice` is called whenever one may have
    begun or ended.
    """

    def __init__(
        self,
        registry: Registry,
        dependencies: Dependencies,
        *,
        network: HostNetwork,
        leases: LeaseListener,
        policy: Authority,
        firewall: Firewall,
        events: EventLog,
        nursery: trio.Nursery,
        guests: Guests,
        notice: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._dependencies = dependencies
        self._network = network
        self._leases = leases
        self._policy = policy
        self._firewall = firewall
        self._events = events
        self._nursery = nursery
        self._guests = guests
        self._notice = notice

    async def get(self, name: str) -> VmView:
        """One machine as it is now.

        Raises:
            NotFound: there is none of that name.
        """
        return self._registry.find(name).view()

    async def list(self) -> builtins.list[VmView]:
        """All machines, by name."""
        return [machine.view() for machine in self._registry.all()]

    async def define(self, spec: VmSpec) -> VmView:
        """Records a machine; nothing of it runs yet.

        Raises:
            Conflict: the name is taken.
            Invalid: it makes no sense, or does not fit this host.
        """
        if (other := self._registry.get(spec.name)) is not None:
            raise Conflict(
                f"there is a machine {spec.name} already ({other.state})",
                hint=f"choose another name, or remove it: rayos rm {spec.name}",
            )
        check_shape(spec)
        check_board(spec)
        Verdict(spec)  # are its patterns patterns?
        self._firewall.check(spec.firewall)
        self._check_arguments(spec)
        notes = await trio.to_thread.run_sync(
            lambda: check_host(spec, read_host(), is_strict=not self._dependencies.overcommit)
        )
        if self._registry.get(spec.name) is not None:
            raise Conflict(f"there is a machine {spec.name} already")
        machine = self._registry.add(Record(spec=spec, uuid=str(uuid.uuid4()), notes=notes))
        self._guard(machine)
        try:
            await self._policy.define(spec.name, spec.capabilities, Place(spec.zone, spec.parent))
            await self._registry.save(machine)
        except BaseException:
            self._registry.discard(spec.name)
            self._firewall.forget(spec.name)
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
        machine = self._registry.find(name)
        async with machine.lock:
            self._check_disks_are_free(machine)
            machine.begin(trio.current_time(), time.time())
            await self._registry.save(machine)
            self._nursery.start_soon(self._live, run_machine, machine)
            self._notice()
        while machine.state is VmState.STARTING:
            await machine.wait_changed()
        if not machine.has_run:
            raise machine.start_error or GuestGone(f"{name} was stopped while it was starting")
        await self._registry.save(machine)  # before anybody is told that it runs
        return machine.view()

    async def stop(self, name: str, timeout_s: float = STOP_TIMEOUT_S) -> VmView:
        """Asks the guest to power down, by ACPI and by our agent; after `timeout_s` pulls the plug.

        Raises:
            Conflict: it is not running.
        """
        machine = self._registry.find(name)
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
        machine = self._registry.find(name)
        machine.apply(LifeEvent.STOP)
        machine.evidence.asked = ExitReason.KILLED
        machine.start_scope.cancel()
        return await self._end(machine)

    async def end_all(self) -> None:
        """Ends every machine at once and removes it: whoever they were for is gone."""
        async with trio.open_nursery() as nursery:
            for machine in self._registry.all():
                nursery.start_soon(self._end_and_remove, machine.name)

    async def _end_and_remove(self, name: str) -> None:
        for act in (self.kill, self.remove):
            with suppress(Conflict, NotFound, Timeout_):  # it had ended, or is gone
                await act(name)

    async def pause(self, name: str) -> VmView:
        """Stops the guest's processors; the guest does not notice.

        Raises:
            Conflict: it is not running.
        """
        machine = self._registry.find(name)
        await machine.need_qmp().execute("stop")
        if machine.state is VmState.RUNNING:
            machine.apply(LifeEvent.PAUSE)
        return machine.view()

    async def resume(self, name: str) -> VmView:
        """Lets a paused guest go on.

        Raises:
            Conflict: it is not running.
        """
        machine = self._registry.find(name)
        await machine.need_qmp().execute("cont")
        if machine.state is VmState.PAUSED:
            machine.apply(LifeEvent.RUN)
        return machine.view()

    async def reset(self, name: str) -> VmView:
        """Presses the reset button.

        Raises:
            Conflict: it is not running.
        """
        machine = self._registry.find(name)
        qmp = machine.need_qmp()
        machine.forget_ready()
        await qmp.execute("system_reset")
        return machine.view()

    async def remove(self, name: str) -> None:
        """Forgets a machine and deletes its own disks, TPM and logs.

        Raises:
            Conflict: it is running.
        """
        machine = self._registry.find(name)
        async with machine.lock:
            if machine.is_live:
                raise Conflict(f"{name} is {machine.state.value}", hint=f"stop it first: rayos stop {name}")
            self._policy.book.check_leave(name)
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
        machine = self._registry.find(name)
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
        machine = self._registry.find(name)
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
        self._registry.find(name).is_released = True

    # Machines of a former service

    async def load(self) -> None:
        """Begins to take over the machines of a former service that live."""
        machines = self._registry.all()
        for machine in machines:
            self._guard(machine)
        await self._policy.forget_ghosts([machine.name for machine in machines])
        self._policy.place({machine.name: machine.record.spec for machine in machines})
        for machine in machines:
            await self._policy.adopt(machine.name, machine.record.spec.capabilities)
        await self._registry.list_unrecorded()
        for machine in machines:
            if machine.is_live:
                self._nursery.start_soon(self._live, adopt_machine, machine)

    async def adopt_networks(self) -> None:
        """Gives every machine that was adopted its addresses back; ends when none is left that is adopting."""
        async with trio.open_nursery() as nursery:
            for machine in [machine for machine in self._registry.all() if machine.is_live]:
                nursery.start_soon(self._adopt_network, machine)
        # An address may have been given after the record was saved; the leases were written before the guest knew.
        for lease in await self._network.leases():
            if lease.state == "bound":
                self._leases.note_lease(lease.mac, lease.address, True)

    async def _adopt_network(self, machine: Machine) -> None:
        bridge, record = machine.record.spec.net.bridge, machine.record
        if bridge is not None and record.live.tap and record.mac:
            await machine.attached.wait()
            if machine.is_live:
                await self._network.adopt(machine.name, record.live.tap, record.mac, bridge)

    async def wait_adopted(self, limit_s: float) -> None:
        """Returns when every machine is looked after, or has ended; at the latest after `limit_s`."""
        with trio.move_on_after(limit_s):
            for machine in self._registry.all():
                if machine.is_live:
                    await machine.attached.wait()

    # Inner workings

    def _guard(self, machine: Machine) -> None:
        """Has the firewall know a machine's card and its own rules."""
        name, spec = machine.name, machine.record.spec
        if spec.net.enabled:
            mac = spec.net.mac or self._network.mac(name)
            is_upstream = spec.net.address == "upstream"
            self._firewall.define(name, spec.firewall, mac, is_upstream=is_upstream)

    def _check_disks_are_free(self, machine: Machine) -> None:
        disks = machine.record.spec.disks
        wanted = {disk.path: disk.read_only for disk in disks if disk.path and not disk.snapshot}
        for other in self._registry.all():
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
                async with self._guests.agent(machine.name) as agent:
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
        is_forgotten = self._registry.get(machine.name) is not machine
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
        await self._registry.delete(machine)
        await self._policy.forget(machine.name)
        if machine.record.mac:
            self._network.forget(machine.record.mac)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(machine.state_directory, ignore_errors=True))
        self._registry.discard(machine.name)
        self._firewall.forget(machine.name)
        self._events.publish("vm.removed", machine.name)
        machine.wake()

    async def _live(self, life: _Life, machine: Machine) -> None:
        """One machine's task: its life, and what is left to do after it."""
        await life(machine, self._dependencies)
        if machine.record.spec.ephemeral and not machine.holders:
            await self._forget(machine)
        self._notice()

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
        elif self._registry.get(machine.name) is machine:
            await self._forget(machine)

"""The machines that the service knows, by name, and their records in the store.

Invariant: a machine that is here has its record in the store, or is being defined or removed.
"""

from __future__ import annotations

import logging
from typing import Final

import msgspec
import trio

from rayos_vmm.config.firewall import FirewallConfig
from rayos_vmm.config.spec import Net, VmSpec, is_name
from rayos_vmm.errors import NotFound
from rayos_vmm.events import EventLog
from rayos_vmm.machine.build import orphans
from rayos_vmm.machine.machine import Machine
from rayos_vmm.machine.record import Record
from rayos_vmm.machine.view import ExitReason, VmState
from rayos_vmm.paths import Paths
from rayos_vmm.service.store import Store

LOG: Final = logging.getLogger(__name__)


class Registry:
    """Use it from one trio run. `load` first."""

    def __init__(self, store: Store, paths: Paths, events: EventLog) -> None:
        self._store = store
        self._paths = paths
        self._events = events
        self._machines: dict[str, Machine] = {}

    async def load(self) -> None:
        """Knows the machines of a former daemon; none of them is looked after yet."""
        records, unreadable = await self._store.load()
        for record in records:
            self.add(record)
        for name, why in unreadable.items():
            self._add_unreadable(name, f"its record cannot be read: {why}")

    def find(self, name: str) -> Machine:
        """The machine of that name. Raises NotFound."""
        try:
            return self._machines[name]
        except KeyError:
            known = ", ".join(sorted(self._machines)) or "none"
            raise NotFound(f"there is no machine {name!r}; known: {known}") from None

    def all(self) -> list[Machine]:
        """All machines as they are, by name."""
        return [self._machines[name] for name in sorted(self._machines)]

    def get(self, name: str) -> Machine | None:
        """The machine of that name, if there is one."""
        return self._machines.get(name)

    def names_by_mac(self) -> dict[str, str]:
        """The name of the machine that has a card, by its MAC."""
        return {one.record.mac: one.name for one in self._machines.values() if one.record.mac}

    def note_address(self, mac: str, address: str) -> None:
        """The live machine that has this card has this address from now on."""
        for machine in self._machines.values():
            if machine.is_live and machine.record.mac == mac and machine.record.address != address:
                machine.record.address = address
                machine.wake()

    # -- changes -------------------------------------------------------------------------------------------------

    def add(self, record: Record) -> Machine:
        """A machine, in memory alone: `save` it."""
        name = record.spec.name
        machine = Machine(
            record, self._events, runtime=self._paths.vm_runtime(name), state=self._paths.vm_state(name)
        )
        self._machines[name] = machine
        return machine

    def discard(self, name: str) -> None:
        """Forgets a machine, in memory alone."""
        self._machines.pop(name, None)

    async def save(self, machine: Machine) -> None:
        """Stores a machine's record; it is on disk when this returns."""
        await self._store.save(machine.record)

    async def delete(self, machine: Machine) -> None:
        """Deletes a machine's record."""
        await self._store.delete(machine.name)

    async def save_firewall(self, name: str, config: FirewallConfig) -> None:
        """Stores the rules that a machine's own have become."""
        machine = self.find(name)
        machine.record.spec = msgspec.structs.replace(machine.record.spec, firewall=config)
        await self.save(machine)

    def _add_unreadable(self, name: str, why: str) -> None:
        """A name that stands for what is left of a machine: it can be seen and removed, and not started."""
        spec = VmSpec(name=name, net=Net(enabled=False), capabilities=())
        machine = self.add(Record(spec=spec, uuid="", state=VmState.FAILED, reason=why))
        machine.unreadable, machine.record.exit_reason = why, ExitReason.LOST
        LOG.error("a machine's record is of no use", extra={"vm": name, "why": why})
        self._events.publish("vm.state", name, state=VmState.FAILED.value, reason=why)

    async def list_unrecorded(self) -> None:
        """Finds processes of machines that have no record: nobody looks after them, and nobody else would name them."""
        for directory in sorted((self._paths.runtime / "vm").iterdir()):
            machine = self._machines.get(directory.name)
            if not is_name(directory.name) or (machine is not None and not machine.unreadable):
                continue
            found = await trio.to_thread.run_sync(orphans, directory, self._paths.vm_state(directory.name))
            if not found:
                continue
            pids = sorted(process.pid for process in found)
            why = f"it runs without a record (processes {', '.join(map(str, pids))})"
            if machine is None:
                self._add_unreadable(directory.name, why)
            else:
                machine.unreadable = machine.record.reason = f"{machine.unreadable}; {why}"
            self._events.publish("vm.unrecorded", directory.name, pids=pids)

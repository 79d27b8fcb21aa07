"""The gate pages of the machines that run: written when the table or the rules change, and who is told beside.

Invariant: a page says what the table and the rule book say; a machine's constraints are told once for each change.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from rayos_vmm.policy import compile as compiler
from rayos_vmm.policy.constraint import NO_BOUNDS, Bounds
from rayos_vmm.policy.rulebook import RuleBook
from rayos_vmm.policy.table import Table
from rayos_vmm.shared.gate import PAGE_NAME, GatePage


class Devices(Protocol):
    """The machines' devices, which are told what does not stand in their page alone (`enforcement.Enforcement`)."""

    async def enforce(self, vm: str, has_other_ports: bool) -> None:
        """Constraints have changed, and perhaps the ports among them; returns when the devices keep to them.

        Raises:
            GuestGone: they do not answer.
            Invalid: their firewall cannot have these rules.
        """
        ...

    def renew(self, vm: str, has_other_ports: bool) -> None:
        """The same, without waiting for the devices."""
        ...


class NoDevices:
    """There is nobody to be told."""

    async def enforce(self, vm: str, has_other_ports: bool) -> None:
        return None

    def renew(self, vm: str, has_other_ports: bool) -> None:
        return None


class GatePages:
    """The pages, by machine. Use it from one trio run."""

    def __init__(self, table: Table, book: RuleBook, devices: Devices) -> None:
        self._table = table
        self._book = book
        self._devices = devices
        self._bounds: dict[str, Bounds] = {}  # as they were told
        self._pages: dict[str, GatePage] = {}

    def open(self, vm: str, runtime: Path, *, is_new: bool) -> Path:
        """The page in a machine's run directory says from now on what the policy says. Errors: OSError."""
        self.close(vm)
        path = runtime / PAGE_NAME
        page = GatePage(path, is_new=is_new)
        page.write(compiler.words(self._table, self._book, vm))
        self._bounds[vm] = self._table.bounds(vm)
        self._pages[vm] = page
        return path

    def close(self, vm: str) -> None:
        """The machine's devices are gone. Safe to call again."""
        page = self._pages.pop(vm, None)
        if page is not None:
            page.close()

    def close_all(self) -> None:
        """The service ends; the pages stay as they are."""
        for vm in list(self._pages):
            self.close(vm)

    def write(self, vms: Iterable[str] | None = None) -> None:
        """These machines' pages (None: all) say what the policy says; who has other constraints is told."""
        chosen = set(self._pages) if vms is None else set(vms)
        for vm in chosen & self._pages.keys():
            self._pages[vm].write(compiler.words(self._table, self._book, vm))
        for vm in chosen:
            now = self._table.bounds(vm)
            before = self._bounds.get(vm, NO_BOUNDS)
            if now != before:
                self._bounds[vm] = now
                self._devices.renew(vm, now.ports != before.ports)

    async def constrain(self, vm: str) -> None:
        """A right rises after the devices keep to its constraints. Raises as `Devices.enforce`."""
        bounds, before = self._table.bounds(vm), self._bounds.get(vm, NO_BOUNDS)
        page = self._pages.get(vm)
        if bounds == before or page is None:
            return
        self._bounds[vm] = bounds
        page.write(msgspec.structs.replace(compiler.words(self._table, self._book, vm), mask=page.mask))
        await self._devices.enforce(vm, bounds.ports != before.ports)

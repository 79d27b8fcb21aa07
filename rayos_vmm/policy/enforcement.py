"""The policy on its way to the devices: firewall rules and new revisions are told; gate pages need no telling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final, Protocol

from rayos_vmm.config.firewall import OwnedRule
from rayos_vmm.errors import GuestGone, NotFound
from rayos_vmm.policy.broadcast import Broadcaster
from rayos_vmm.policy.constraint import port_rules
from rayos_vmm.policy.distribution import Distribution
from rayos_vmm.policy.rulebook import RuleBook
from rayos_vmm.policy.table import Table

#: So long a change waits for the workers to have applied it.
APPLY_TIMEOUT_S: Final = 10.0


class FirewallPort(Protocol):
    """Every machine's firewall (`rayos_vmm.network.firewall`)."""

    def check_inherited(self, vm: str, inherited: Sequence[OwnedRule]) -> None: ...
    async def refresh(self, vm: str) -> int: ...


class InheritedRules:
    """The firewall rules that a machine has before its own: its grants' ports, then the policy document's."""

    def __init__(self, table: Table, book: RuleBook) -> None:
        self._table = table
        self._book = book

    def merge(self, vm: str, own: Sequence[OwnedRule]) -> list[OwnedRule]:
        """A machine's effective rules, from its own."""
        return [*port_rules(self._table.bounds(vm).ports, "grants"), *self._book.merge(vm, own)]

    def members(self, word: str) -> Iterable[str]:
        """The machines in a `zone:NAME`. Raises Invalid."""
        return self._book.members(word)


class Enforcement:
    """Tells the machines' firewalls and workers; see `pages.Devices`. Without `firewall` no machine has a card."""

    def __init__(self, revision: int, firewall: FirewallPort | None = None) -> None:
        self.broadcaster = Broadcaster(Distribution(revision), self.refresh)
        self._firewall = firewall

    def check_inherited(self, vm: str, inherited: Sequence[OwnedRule]) -> None:
        """Whether a machine's firewall can have these rules before its own. Raises Invalid."""
        if self._firewall is not None:
            self._firewall.check_inherited(vm, inherited)

    def renew(self, vm: str, has_other_ports: bool) -> None:
        """See `pages.Devices.renew`."""
        self.broadcaster.renew(vm, is_stale=has_other_ports)

    async def enforce(self, vm: str, has_other_ports: bool) -> None:
        """A machine's devices keep to the constraints of its grants when this returns. Raises GuestGone, Invalid."""
        if has_other_ports:
            await self.refresh(vm)
        self.broadcaster.renew(vm, is_stale=False)
        if not await self.broadcaster.wait_applied(vm, APPLY_TIMEOUT_S):
            raise GuestGone(f"the devices of {vm} did not take the constraints within {APPLY_TIMEOUT_S:g} s")

    async def refresh(self, vm: str) -> None:
        """A machine's firewall has the rules of now. Raises GuestGone, Invalid."""
        if self._firewall is not None:
            with suppress(NotFound):  # it has no card
                await self._firewall.refresh(vm)

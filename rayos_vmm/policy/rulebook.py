"""The policy document in force, which machines there are, and what it means for each of them.

Invariant: `effective` has every machine of the document and every one that joined; a change that does not compile for
all of them leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rayos_vmm.config.firewall import ZONE, OwnedRule
from rayos_vmm.config.spec import Quota
from rayos_vmm.errors import Conflict, Invalid
from rayos_vmm.policy.capability import Capability
from rayos_vmm.policy.document import (
    FIREWALL_RULES_MAXIMUM,
    MACHINES_MAXIMUM,
    ZONES_MAXIMUM,
    Document,
    count_firewall_rules,
)
from rayos_vmm.policy.hierarchy import Effective, Place, compile_one, compile_policy, place
from rayos_vmm.policy.view import Usage


class RuleBook:
    """Begins with an empty document: every machine has what it was given, and no rule."""

    def __init__(self, document: Document | None = None, revision: int = 0) -> None:
        self.document = document or Document()
        self.revision = revision
        self.places: dict[str, Place] = {}
        self.effective: dict[str, Effective] = compile_policy(self.document, {})

    def of(self, vm: str) -> Effective:
        """Returns the rules of a machine; for one that nobody knows, those of every machine."""
        return self.effective.get(vm) or compile_one(self.document, {}, vm)

    def usage(self) -> dict[str, Usage]:
        """How many there are of what has a limit, and the limit."""
        document = self.document
        return {
            "zones": Usage(used=len(document.zone), limit=ZONES_MAXIMUM),
            "machines": Usage(used=len(self.effective), limit=MACHINES_MAXIMUM),
            "firewall_rules": Usage(used=count_firewall_rules(document), limit=FIREWALL_RULES_MAXIMUM),
        }

    def zone_of(self, vm: str) -> str | None:
        """The zone that a machine is in; None for one that nobody knows, too."""
        effective = self.effective.get(vm)
        return effective.zone if effective is not None else None

    def members(self, word: str) -> list[str]:
        """The machines in a `zone:NAME`. Raises Invalid when there is no such zone."""
        zone = word.removeprefix(ZONE)
        if zone not in self.document.zone:
            raise Invalid(f"there is no {word}")
        return [vm for vm, effective in self.effective.items() if effective.zone == zone]

    def merge(self, vm: str, own: Sequence[OwnedRule]) -> list[OwnedRule]:
        """A machine's firewall rules: those of the policy before its own, where their priority is the same."""
        return sorted([*self.of(vm).firewall, *own], key=lambda owned: owned.rule.priority)

    def narrow(self, vm: str, rights: Capability) -> Capability:
        """Narrows the rights that a machine was given by the rules."""
        return rights & self.of(vm).capabilities

    def cap(self, vm: str, quota: Quota) -> Quota:
        """Returns the quota of a machine, narrowed by the rules."""
        return self.of(vm).cap(quota)

    def trial(self, document: Document) -> Mapping[str, Effective]:
        """Compiles another document without applying it. Raises Invalid with the path of the fault."""
        return compile_policy(document, self.places)

    def take(self, document: Document, revision: int, effective: Mapping[str, Effective]) -> None:
        """Another document holds; `effective` is of its trial, with no machine come or gone since."""
        self.document = document
        self.revision = revision
        self.effective = dict(effective)

    def join(self, vm: str, where: Place) -> None:
        """A machine comes.

        Raises:
            Conflict: there are too many.
            Invalid: its zone or parent makes no sense.
        """
        known = {*self.places, *self.document.vm}
        if vm not in known and len(known) >= MACHINES_MAXIMUM:
            raise Conflict(
                f"there are {len(known)} machines; at most {MACHINES_MAXIMUM} are allowed",
                hint="remove one that is not needed: rayos ps, rayos rm",
            )
        places = {**self.places, vm: where}
        self.effective[vm] = compile_one(self.document, places, vm)
        self.places = places

    def adopt(self, places: Mapping[str, Place]) -> dict[str, str]:
        """Machines that were there before. One whose place makes no sense any more has none: why not, by machine."""
        self.places = dict(places)
        trouble: dict[str, str] = {}
        for vm in sorted(places):
            try:
                compile_one(self.document, self.places, vm)
            except Invalid as error:
                trouble[vm] = error.message
        self.places |= dict.fromkeys(trouble, Place())
        self.effective = compile_policy(self.document, self.places)
        return trouble

    def children(self, vm: str) -> list[str]:
        """The machines whose parent it is."""
        return [
            name
            for name in sorted({*self.places, *self.document.vm})
            if place(self.document, self.places, name).parent == vm
        ]

    def check_leave(self, vm: str) -> None:
        """Raises Conflict when others inherit by it."""
        if children := self.children(vm):
            raise Conflict(
                f"{vm} is the parent of {', '.join(children)}",
                hint="remove these first, or assign them elsewhere",
            )

    def leave(self, vm: str) -> None:
        """A machine goes; it stays as a name while others inherit by it."""
        if self.children(vm):
            return
        self.places.pop(vm, None)
        if vm not in self.document.vm:
            self.effective.pop(vm, None)

"""The effective rules of each machine: those of the host, its zone, its parents and its own, in this order.

A rule of a level adds to those above (`mode = "inherit"`), or takes the place of the one of its name (`"override"`).
Firewall rules are looked at by priority, at the same priority those from above first; of capability rules every one
narrows; of resource rules the least holds. Each result names its origin: `host`, `zone:lab` or `vm:web`, and the rule.

Invariant: `compile_policy` gives an answer for every machine or none at all, and the error names the path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from msgspec import UNSET

from rayos_devices.limits import MAXIMUM
from rayos_vmm.config.firewall import ZONE, OwnedRule, names
from rayos_vmm.config.spec import Quota
from rayos_vmm.config.units import parse_rate, parse_size
from rayos_vmm.errors import Invalid
from rayos_vmm.policy.capability import DEVICE_NAMES, DEVICE_RIGHTS, Capability
from rayos_vmm.policy.document import (
    CapabilityRule,
    Document,
    FirewallRule,
    Member,
    PolicyRule,
    ResourceRule,
)
from rayos_vmm.policy.view import EffectiveView, InheritedRule, LimitView

#: Machines from the top to the last child.
DEPTH_MAXIMUM: Final = 8
_LIMITS: Final[dict[str, Callable[[Any], int]]] = {
    "net_rate": parse_rate,
    "gpu_memory": parse_size,
    "disk": parse_size,
    "input_queue": int,
}


class Place(msgspec.Struct, frozen=True):
    """Where a machine's own specification puts it."""

    zone: str | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Effective:
    """All that holds for one machine.

    `levels` are the origins from above, `taken` says for each right that is denied which rule took it, `limits` the
    least value as it was written, and its origin.
    """

    vm: str = ""
    zone: str | None = None
    parent: str | None = None
    levels: tuple[str, ...] = ("host",)
    capabilities: Capability = DEVICE_RIGHTS
    taken: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, tuple[str | int, str]] = field(default_factory=dict)
    firewall: tuple[OwnedRule, ...] = ()

    def cap(self, quota: Quota) -> Quota:
        """A machine's own quota, nowhere above the limits."""
        lower = {
            name: limit
            for name, (limit, _) in self.limits.items()
            if _LIMITS[name](limit) < _LIMITS[name](getattr(quota, name))
        }
        return msgspec.structs.replace(quota, **lower)

    def bounds(self) -> dict[str, int]:
        """The limits as numbers (bits a second, bytes, events), at least 1, as devices take them."""
        return {name: min(max(1, _LIMITS[name](limit)), MAXIMUM) for name, (limit, _) in self.limits.items()}

    def view(self) -> EffectiveView:
        """For callers."""
        return EffectiveView(
            vm=self.vm,
            zone=self.zone,
            parent=self.parent,
            levels=list(self.levels),
            denied=dict(self.taken),
            limits={
                name: LimitView(limit=limit, from_=origin) for name, (limit, origin) in self.limits.items()
            },
            firewall=[
                InheritedRule(
                    name=owned.rule.name,
                    action=owned.rule.action,
                    priority=owned.rule.priority,
                    from_=owned.origin,
                )
                for owned in self.firewall
            ],
        )


def place(document: Document, places: Mapping[str, Place], vm: str) -> Member:
    """A machine as the document has it; where that is silent, as its specification says."""
    member = document.vm.get(vm, Member())
    own = places.get(vm, Place())
    return msgspec.structs.replace(member, zone=member.zone or own.zone, parent=member.parent or own.parent)


def line(document: Document, places: Mapping[str, Place], vm: str) -> list[str]:
    """A machine's parents, from the top, and itself.

    Raises:
        Invalid: a parent is unknown, the line is a circle, or it is too long.
    """
    found = [vm]
    while (parent := place(document, places, found[-1]).parent) is not None:
        path = f"vm.{found[-1]}.parent = {parent!r}"
        if parent in found:
            raise Invalid(f"{path}: a circle, {' <- '.join([*found, parent])}")
        if parent not in places and parent not in document.vm:
            raise Invalid(f"{path}: there is no such machine")
        found.append(parent)
        if len(found) > DEPTH_MAXIMUM:
            raise Invalid(f"{path}: the line of parents has more than {DEPTH_MAXIMUM} machines")
    return found[::-1]


def compile_one(
    document: Document,
    places: Mapping[str, Place],
    vm: str,
    compiled: dict[tuple[str, str], OwnedRule] | None = None,
) -> Effective:
    """Compiles the rules of one machine; `compiled` has firewall rules by origin and name. Raises Invalid."""
    compiled = {} if compiled is None else compiled
    family = line(document, places, vm)
    zone: str | None = None
    for name in family:
        own = place(document, places, name).zone
        if own is not None and own not in document.zone:
            raise Invalid(f"vm.{name}.zone = {own!r}: there is no such zone")
        if own is not None and zone not in (None, own):
            raise Invalid(f"vm.{name}.zone = {own!r}: its parent is in zone {zone!r}")
        zone = own or zone
    levels: list[tuple[str, str, Mapping[str, PolicyRule]]] = [("host", "host", document.host.rules)]
    if zone is not None:
        levels.append((f"zone:{zone}", f"zone.{zone}", document.zone[zone].rules))
    levels += [
        (f"vm:{name}", f"vm.{name}", document.vm[name].rules) for name in family if name in document.vm
    ]
    rules = _merge(levels)
    mask, taken = _narrow(rules)
    firewall = []
    for name, origin, rule in rules:
        if isinstance(rule, FirewallRule):
            if (origin, name) not in compiled:
                compiled[origin, name] = rule.compiled(name, origin)
            firewall.append(compiled[origin, name])
    firewall.sort(key=lambda owned: owned.rule.priority)
    origins = tuple(origin for origin, _, _ in levels)
    parent = family[-2] if len(family) > 1 else None
    return Effective(vm, zone, parent, origins, mask, taken, _least(rules), tuple(firewall))


def compile_policy(document: Document, places: Mapping[str, Place]) -> dict[str, Effective]:
    """Compiles the rules of every machine that the document or a specification knows.

    Raises:
        Invalid: with the path of what is wrong; nothing of the document may be used then.
    """
    _check_words(document)
    for name, level in document.zone.items():  # also those that no machine is in
        _merge([("host", "host", document.host.rules), (f"zone:{name}", f"zone.{name}", level.rules)])
    _merge([("host", "host", document.host.rules)])
    compiled: dict[tuple[str, str], OwnedRule] = {}
    return {vm: compile_one(document, places, vm, compiled) for vm in sorted({*places, *document.vm})}


def _check_words(document: Document) -> None:
    """Zones that rules name as addresses have to be there."""
    levels: list[tuple[str, Mapping[str, PolicyRule]]] = [("host", document.host.rules)]
    levels += [(f"zone.{name}", level.rules) for name, level in document.zone.items()]
    levels += [(f"vm.{name}", member.rules) for name, member in document.vm.items()]
    for path, rules in levels:
        for name, rule in rules.items():
            if isinstance(rule, FirewallRule):
                for word in names([rule.compiled(name, "").rule]):
                    if word.startswith(ZONE) and word.removeprefix(ZONE) not in document.zone:
                        raise Invalid(f"{path}.rules.{name}: there is no {word}")


def _merge(
    levels: Iterable[tuple[str, str, Mapping[str, PolicyRule]]],
) -> list[tuple[str, str, PolicyRule]]:
    """(name, origin, rule) of all that hold, from above."""
    found: dict[str, tuple[str, PolicyRule]] = {}
    for origin, path, rules in levels:
        for name, rule in rules.items():
            above = found.pop(name, None)
            if rule.mode == "override":
                if above is None:
                    raise Invalid(f"{path}.rules.{name}: it overrides a rule that no level above has")
                if type(rule) is not type(above[1]):
                    raise Invalid(f"{path}.rules.{name}: it overrides a rule of another kind, of {above[0]}")
            elif above is not None:
                raise Invalid(
                    f"{path}.rules.{name}: {above[0]} has a rule of this name",
                    hint='name it otherwise, or say mode = "override"',
                )
            found[name] = (origin, rule)
    return [(name, origin, rule) for name, (origin, rule) in found.items()]


def _narrow(rules: Iterable[tuple[str, str, PolicyRule]]) -> tuple[Capability, dict[str, str]]:
    mask = DEVICE_RIGHTS
    taken: dict[str, str] = {}
    for name, origin, rule in rules:
        if isinstance(rule, CapabilityRule):
            for capability in DEVICE_NAMES:
                is_kept = (rule.allow is UNSET or capability in rule.allow) and capability not in rule.deny
                if not is_kept and Capability[capability] in mask:
                    mask &= ~Capability[capability]
                    taken[capability] = f"{origin}/{name}"
    return mask, taken


def _least(rules: Iterable[tuple[str, str, PolicyRule]]) -> dict[str, tuple[str | int, str]]:
    least: dict[str, tuple[str | int, str]] = {}
    for name, origin, rule in rules:
        if isinstance(rule, ResourceRule):
            for key, value_of in _LIMITS.items():
                limit = getattr(rule, key)
                if limit is not UNSET and (key not in least or value_of(limit) < value_of(least[key][0])):
                    least[key] = (limit, f"{origin}/{name}")
    return least

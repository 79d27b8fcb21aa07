"""A model of the policy that knows only what was given, by whom, until when, and under which rules.

Nothing is removed, a link is only cut; nothing is compiled, every question walks from the top.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rayos_vmm.policy.capability import Capability
from rayos_vmm.policy.constraint import Constraints
from rayos_vmm.policy.grant import Moment

Held = list[tuple[int, list[Constraints]]]
NET, DISK = int(Capability.CAP_NET), int(Capability.CAP_DISK_R | Capability.CAP_DISK_W)


class Model:
    """Every right is a path of links that all still hold, used as the narrowest of them says."""

    def __init__(self) -> None:
        self.links: dict[
            int, tuple[str, int | None, int, Constraints]
        ] = {}  # id: holder, parent, rights, limits
        self.ends: dict[int, tuple[float, float]] = {}
        self.cut: dict[int, int] = {}
        self.over: set[int] = set()

    def add(
        self,
        id_: int,
        vm: str,
        parent: int | None,
        bits: int,
        ttl: float | None,
        now: Moment,
        limits: Constraints,
    ) -> None:
        self.links[id_] = (vm, parent, bits, limits)
        self.cut[id_] = 0
        if ttl is not None:
            self.ends[id_] = (now.wall + ttl, now.steady + ttl)

    def tick(self, now: Moment) -> None:
        for id_, (wall, steady) in self.ends.items():
            if now.wall >= wall or now.steady >= steady:
                self.over.add(id_)

    def path(self, id_: int | None) -> Iterator[int]:
        while id_ is not None:
            yield id_
            id_ = self.links[id_][1]

    def bits(self, id_: int) -> int:
        found = -1
        for link in self.path(id_):
            found &= 0 if link in self.over else self.links[link][2] & ~self.cut[link]
        return found

    def held(self, vm: str) -> Held:
        """(rights, the constraints along the path) of every link of a machine that gives any right."""
        return [
            (bits, [self.links[link][3] for link in self.path(id_)])
            for id_, (holder, _, _, _) in self.links.items()
            if holder == vm and (bits := self.bits(id_))
        ]

    def holds(self, vm: str) -> int:
        found = 0
        for bits, _ in self.held(vm):
            found |= bits
        return found


def may_use(held: Held, port: int) -> bool:
    """Whether one of a machine's links lets it use a port."""
    return any(
        bits & NET and all(not one.ports or any(a <= port <= b for a, b in one.ports) for one in limits)
        for bits, limits in held
    )


def most(held: Held, rights: int, what: str) -> float:
    """The most that one of its links allows of `bandwidth` or `concurrent`."""
    allowed = [
        min([float("inf"), *(value for one in limits if (value := getattr(one, what)) is not None)])
        for bits, limits in held
        if bits & rights
    ]
    return max(allowed, default=0.0)


def is_audited(held: Held, right: int) -> bool:
    """Whether one of its links wants the use of a right recorded."""
    return any(bits & right and any(one.audit for one in limits) for bits, limits in held)


def denied(tables: dict[str, Any], vm: str) -> int | None:
    """The rights that a document takes from a machine; None when it makes no sense there."""
    family = [vm]
    while parent := tables["vm"][family[0]].get("parent"):
        if parent in family:
            return None
        family.insert(0, parent)
    zones = {tables["vm"][one]["zone"] for one in family if "zone" in tables["vm"][one]}
    if len(zones) > 1:
        return None
    above = (
        tables["host"],
        *(tables["zone"][zone] for zone in zones),
        *(tables["vm"][one] for one in family),
    )
    return _taken(above)


def is_sound(tables: dict[str, Any]) -> bool:
    """Whether a document makes sense for every machine, and in zones that nobody is in."""
    alone = [_taken((tables["host"], zone)) for zone in tables["zone"].values()]
    return None not in alone and all(denied(tables, vm) is not None for vm in tables["vm"])


def _taken(levels: Iterable[dict[str, Any]]) -> int | None:
    active: dict[str, list[str]] = {}
    for level in levels:
        for name, rule in level["rules"].items():
            if (name in active) is not (rule["mode"] == "override"):
                return None
            active[name] = rule["deny"]
    return sum({int(Capability[word]) for words in active.values() for word in words})

"""No sequence of steps raises rights: the table against a model that knows only what was given, by whom, until when."""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rayos_vmm.policy.capability import DEVICE_RIGHTS, Capability
from rayos_vmm.policy.grant import Moment
from rayos_vmm.policy.table import Denied, Table

EXAMPLES = int(os.environ.get("RAYOS_SOAK_EXAMPLES", "60"))
STEPS = int(os.environ.get("RAYOS_SOAK_STEPS", "50"))
VMS = ["a", "b", "c", "d", "e"]
vms = st.sampled_from(VMS)
rights = st.integers(1, int(DEVICE_RIGHTS)).map(Capability)
ttls = st.none() | st.floats(0.001, 100)


class Model:
    """Fifty lines: every right is a path of links that all still hold. Nothing is removed, a link is only cut."""

    def __init__(self) -> None:
        self.links: dict[int, tuple[str, int | None, int]] = {}  # id: holder, parent, rights
        self.ends: dict[int, tuple[float, float]] = {}
        self.cut: dict[int, int] = {}
        self.over: set[int] = set()

    def add(self, id_: int, vm: str, parent: int | None, bits: int, ttl: float | None, now: Moment) -> None:
        self.links[id_] = (vm, parent, bits)
        self.cut[id_] = 0
        if ttl is not None:
            self.ends[id_] = (now.wall + ttl, now.steady + ttl)

    def tick(self, now: Moment) -> None:
        for id_, (wall, steady) in self.ends.items():
            if now.wall >= wall or now.steady >= steady:
                self.over.add(id_)

    def bits(self, id_: int | None) -> int:
        found = -1
        while id_ is not None:
            _, parent, bits = self.links[id_]
            found &= 0 if id_ in self.over else bits & ~self.cut[id_]
            id_ = parent
        return found

    def holds(self, vm: str) -> int:
        found = 0
        for id_, (holder, _, _) in self.links.items():
            if holder == vm:
                found |= self.bits(id_)
        return found


class Rights(RuleBasedStateMachine):
    """Grant, delegate, revoke, wait, set the clock, store and load, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.model = Model()
        self.now = Moment(1000.0, 10.0, "boot")

    @initialize(bases=st.lists(rights | st.just(Capability(0)), min_size=5, max_size=5))
    def define(self, bases: list[Capability]) -> None:
        for vm, base in zip(VMS, bases, strict=True):
            self.model.add(self.table.define(vm, base).id, vm, None, int(base), None, self.now)

    @rule(vm=vms, what=rights, ttl=ttls)
    def grant(self, vm: str, what: Capability, ttl: float | None) -> None:
        self.model.add(self.table.grant(vm, what, ttl, "", self.now).id, vm, None, int(what), ttl, self.now)

    @rule(source=vms, to=vms, what=rights, ttl=ttls)
    def delegate(self, source: str, to: str, what: Capability, ttl: float | None) -> None:
        try:
            made = self.table.delegate(source, to, what, ttl, self.now)
        except Denied:
            return
        assert int(what) & ~self.model.holds(source) == 0
        assert made.hops <= 3 and made.parent is not None
        self.model.add(made.id, to, made.parent, int(what), ttl, self.now)

    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        known = sorted(self.table.grants)
        if known:
            chosen = data.draw(st.sampled_from(known))
            self.table.revoke(chosen, self.now)
            self.model.cut[chosen] = -1

    @rule(vm=vms, what=rights)
    def revoke_rights(self, vm: str, what: Capability) -> None:
        self.table.revoke_rights(vm, what, self.now)
        for id_, (holder, _, _) in self.model.links.items():
            if holder == vm:
                self.model.cut[id_] |= int(what)

    @rule(seconds=st.floats(0, 200))
    def wait(self, seconds: float) -> None:
        self._at(Moment(self.now.wall + seconds, self.now.steady + seconds, "boot"))

    @rule(seconds=st.floats(-500, 500))
    def set_clock(self, seconds: float) -> None:
        self._at(Moment(self.now.wall + seconds, self.now.steady, "boot"))

    @rule()
    def restart(self) -> None:
        self.table = self.table.copy()

    def _at(self, now: Moment) -> None:
        self.now = now
        self.model.tick(now)
        self.table.expire(now)

    @invariant()
    def same_rights(self) -> None:
        for vm in VMS:
            assert int(self.table.holds(vm)) == self.model.holds(vm)


TestRights = Rights.TestCase
TestRights.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None)

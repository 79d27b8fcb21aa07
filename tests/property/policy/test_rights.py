"""No sequence of steps raises rights: table, constraints and rules against `model`."""

from __future__ import annotations

import os
from functools import reduce
from operator import or_
from typing import Any

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rayos_vmm.errors import Invalid
from rayos_vmm.policy.capability import DEVICE_NAMES, DEVICE_RIGHTS, OPERATIONS, Capability
from rayos_vmm.policy.constraint import Constraints
from rayos_vmm.policy.document import parse
from rayos_vmm.policy.grant import Moment
from rayos_vmm.policy.hierarchy import Place
from rayos_vmm.policy.rulebook import RuleBook
from rayos_vmm.policy.table import Denied, Table
from tests.property.policy.model import DISK, NET, Model, denied, is_audited, is_sound, may_use, most

EXAMPLES = int(os.environ.get("RAYOS_SOAK_EXAMPLES", "60"))
STEPS = int(os.environ.get("RAYOS_SOAK_STEPS", "50"))
VMS = ["a", "b", "c", "d", "e"]
PORTS = [0, 22, 80, 443, 65535]
vms = st.sampled_from(VMS)
#: Mostly few and the same, so that grants, delegations and revocations meet.
rights = st.sampled_from(
    [Capability.CAP_NET] * 3
    + [Capability.CAP_DISK_W, Capability.CAP_NET | Capability.CAP_DISK_W, DEVICE_RIGHTS]
) | st.sets(st.sampled_from(list(OPERATIONS)), min_size=1).map(lambda some: reduce(or_, some))
ttls = st.none() | st.floats(0.001, 100)
ranges = st.sampled_from([(0, 79), (22, 22), (80, 80), (80, 443), (400, 65535)])
limits = st.just(Constraints()) | st.builds(
    Constraints,
    ports=st.lists(ranges, max_size=2).map(tuple),
    bandwidth=st.none() | st.sampled_from([8000, 10**6, 10**9]),
    concurrent=st.none() | st.sampled_from([1, 4, 64]),
    audit=st.booleans(),
)
deny = st.lists(st.sampled_from(DEVICE_NAMES), max_size=2, unique=True)


def level(name: str, mode: str) -> st.SearchStrategy[dict[str, Any]]:
    """No rule, or one; often one that makes sense below the others."""
    modes = st.sampled_from([mode, mode, mode, "inherit", "override"])
    rules = st.fixed_dictionaries({"kind": st.just("capability"), "mode": modes, "deny": deny})
    return st.just({"rules": {}}) | rules.map(lambda rule: {"rules": {name: rule}})


def member(vm: str) -> st.SearchStrategy[dict[str, Any]]:
    """A machine, mostly below one that comes before it."""
    parents = st.sampled_from([*VMS[: VMS.index(vm)]] * 4 + VMS)
    place = st.fixed_dictionaries({}, optional={"zone": st.just("x"), "parent": parents})
    rule = level("r", "override") | level(vm, "inherit")
    return st.tuples(rule, place | st.just({}) | st.just({"zone": "y"})).map(
        lambda both: {**both[0], **both[1]}
    )


documents = st.fixed_dictionaries(
    {
        "host": level("r", "inherit"),
        "zone": st.fixed_dictionaries({"x": level("r", "override"), "y": level("s", "inherit")}),
        "vm": st.fixed_dictionaries({vm: st.just({"rules": {}}) | member(vm) for vm in VMS}),
    }
)


def own_operations(right: Capability) -> int:
    """Operations that this right alone allows, as a mask."""
    others = {op for other, ops in OPERATIONS.items() if other is not right for op in ops}
    return sum(1 << op.index for op in set(OPERATIONS[right]) - others)


OWN = [(int(right), own_operations(right)) for right in OPERATIONS]


class Rights(RuleBasedStateMachine):
    """Grant, delegate, revoke, wait, set the clock, store and load, change the rules, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.book = RuleBook()
        self.model = Model()
        self.now = Moment(1000.0, 10.0, "boot")
        self.denied = dict.fromkeys(VMS, 0)

    @initialize(
        bases=st.lists(st.sampled_from([Capability(0)] * 4 + [DEVICE_RIGHTS]), min_size=5, max_size=5)
    )
    def define(self, bases: list[Capability]) -> None:
        for vm, base in zip(VMS, bases, strict=True):
            self.book.join(vm, Place())
            made = self.table.define(vm, base)
            self.model.add(made.id, vm, None, int(base), None, self.now, Constraints())

    @rule(vm=vms, what=rights, ttl=ttls, how=limits)
    def grant(self, vm: str, what: Capability, ttl: float | None, how: Constraints) -> None:
        if how.problem(what):
            how = Constraints(audit=how.audit)
        made = self.table.grant(vm, what, ttl, "", self.now, how)
        self.model.add(made.id, vm, None, int(what), ttl, self.now, how)

    @rule(source=vms, to=vms, what=rights, ttl=ttls, how=limits)
    def delegate(self, source: str, to: str, what: Capability, ttl: float | None, how: Constraints) -> None:
        try:
            made = self.table.delegate(source, to, what, ttl, self.now, how)
        except Denied:
            return
        event("a delegation with constraints" if made.constraints.count else "a delegation")
        assert int(what) & ~self.model.holds(source) == 0
        assert made.hops <= 3 and made.parent is not None
        assert how.bandwidth is None or made.constraints.bandwidth == how.bandwidth
        self.model.add(made.id, to, made.parent, int(what), ttl, self.now, how)

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
        for id_, (holder, _, _, _) in self.model.links.items():
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

    @rule(tables=documents)
    def legislate(self, tables: dict[str, Any]) -> None:
        """All of a document holds, or nothing of it."""
        document = parse(tables)
        try:
            trial = self.book.trial(document)
        except Invalid:
            assert not is_sound(tables)
            event("a document that makes no sense")
            return
        assert is_sound(tables)
        event("a document")
        self.book.take(document, self.book.revision + 1, trial)
        self.denied = {vm: denied(tables, vm) or 0 for vm in VMS}

    def _at(self, now: Moment) -> None:
        self.now = now
        self.model.tick(now)
        self.table.expire(now)

    @invariant()
    def same_rights(self) -> None:
        for vm in VMS:
            held = self.table.holds(vm)
            assert int(held) == self.model.holds(vm)
            assert int(self.book.narrow(vm, held)) == self.model.holds(vm) & ~self.denied[vm]

    @invariant()
    def same_bounds(self) -> None:
        for vm in VMS:
            held, found = int(self.table.holds(vm)), self.table.bounds(vm)
            links = self.model.held(vm)
            for port in PORTS if held & NET else ():
                is_open = not found.ports or any(first <= port <= last for first, last in found.ports)
                assert is_open is may_use(links, port)
            for limit, used, what in (
                (found.net, NET, "bandwidth"),
                (found.disk, DISK, "bandwidth"),
                (found.at_once, DISK, "concurrent"),
            ):
                if held & used:
                    assert (float("inf") if limit is None else limit) == most(links, used, what)
            for right, bits in OWN:
                assert found.audited & bits == (bits if is_audited(links, right) else 0)


TestRights = Rights.TestCase
TestRights.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None)

"""The policy as devices see it: what a machine's gate page says (`shared/gate.py`), and why."""

from __future__ import annotations

from rayos_vmm.policy.capability import Capability, mask, names
from rayos_vmm.policy.grant import Moment, chain
from rayos_vmm.policy.rulebook import RuleBook
from rayos_vmm.policy.table import Table
from rayos_vmm.policy.view import RightView
from rayos_vmm.shared.gate import Words


def words(table: Table, book: RuleBook, vm: str) -> Words:
    """Returns the words of the gate page of `vm`: its rights, narrowed by the rules, and the least of its limits."""
    bounds = table.bounds(vm)
    limits = book.of(vm).bounds()
    rates = [rate for rate in (bounds.net, limits.get("net_rate")) if rate is not None]
    return Words(
        mask=mask(book.narrow(vm, table.holds(vm))),
        revision=book.revision,
        audited=bounds.audited,
        net_rate=min(rates, default=0) // 8,
        disk_rate=(bounds.disk or 0) // 8,
        disk_size=limits.get("disk", 0),
        gpu_memory=limits.get("gpu_memory", 0),
        input_queue=limits.get("input_queue", 0),
        disk_at_once=bounds.at_once or 0,
    )


def explain(table: Table, book: RuleBook, vm: str, now: Moment) -> list[RightView]:
    """For each right of `vm`, the chains of grants that it comes from (none where it lacks it), and the rule that takes
    it away.
    """
    own = [grant for grant in table.grants.values() if grant.holder == vm]
    return [
        RightView(
            capability=name,
            allowed=Capability[name] in book.narrow(vm, table.holds(vm)),
            denied_by=book.of(vm).taken.get(name),
            from_=[
                [link.view(now) for link in chain(table.grants, grant)]
                for grant in own
                if Capability[name] in grant.capabilities
            ],
        )
        for name in names(Capability(sum(Capability) & ~(Capability.CAP_AUDIT | Capability.CAP_ADMIN)))
    ]

"""The policy as callers see it: grants, origins, revisions, and how far the newest one has come."""

from __future__ import annotations

import msgspec

from rayos_vmm.config.load import Table
from rayos_vmm.policy.constraint import Constraints
from rayos_vmm.policy.document import Change


class View(msgspec.Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """Base of what callers see."""


class GrantView(View, frozen=True):
    """A grant: who has which rights until when (seconds since the epoch), and the grant that it comes from."""

    id: int
    kind: str
    vm: str
    capabilities: list[str]
    reason: str
    expires: float | None
    left_s: float | None
    parent: int | None
    hops: int
    constraints: Constraints


class RightView(View, frozen=True):
    """A right of a machine: whether it holds, the rule that takes it away, and the chains of grants it comes from."""

    capability: str
    allowed: bool
    denied_by: str | None
    from_: list[list[GrantView]]


class LimitView(View, frozen=True):
    """A limit, and the rule that it comes from."""

    limit: str | int
    from_: str


class InheritedRule(View, frozen=True):
    """A firewall rule that a machine inherits, and from where."""

    name: str
    action: str
    priority: int
    from_: str


class EffectiveView(View, frozen=True):
    """All that rules say of a machine: its place, and each thing with its origin."""

    vm: str
    zone: str | None
    parent: str | None
    levels: list[str]
    denied: dict[str, str]
    limits: dict[str, LimitView]
    firewall: list[InheritedRule]


class PolicyView(EffectiveView, frozen=True):
    """All that holds for a machine, in the revision in force, and its rights."""

    revision: int
    rights: list[RightView]


class Usage(View, frozen=True):
    """How many there are of something, and how many there may be."""

    used: int
    limit: int


class RecordState(View, frozen=True):
    """The audit record: how many were written, are in memory and were lost; the trouble is empty when there is none."""

    records: int
    in_memory: int
    lost: int
    trouble: str
    witness: str


class PolicyStatus(View, frozen=True):
    """How much there is of everything that has a limit, and whether decisions can be recorded."""

    revision: int
    grants: Usage
    delegations: Usage
    constraints: Usage
    zones: Usage
    machines: Usage
    firewall_rules: Usage
    audit: RecordState


class Decisions(View, frozen=True):
    """Decisions about callers since the service started."""

    allowed: int
    denied: int


class CallerStatus(View, frozen=True):
    """The tokens that hold, and what was decided since the service started."""

    tokens: Usage
    decisions: Decisions


class Verified(View, frozen=True):
    """Whether the audit record is what was written; else where it is not, and why."""

    ok: bool
    lost: int = 0
    heads: int = 0
    records: int = 0
    first: int = 0
    digest: str = ""
    signed: int = 0
    problem: str = ""
    seq: int = 0
    offset: int = 0


class Shown(View, frozen=True):
    """The document in force; revision 0 before the first."""

    revision: int
    document: Table


class Changes(View, frozen=True):
    """Changes by path, the revision in force now, and the machines whose workers have not applied it."""

    changes: list[Change]
    revision: int | None = None
    lagging: list[str] = []


class Zone(View, frozen=True):
    """A zone, the number of its rules, and its machines."""

    zone: str
    rules: int
    vms: list[str]


class LaggingZone(Zone, frozen=True):
    """A zone, and those of its machines that have not applied the newest revision."""

    lagging: list[str]


class LaggingVm(View, frozen=True):
    """A machine, the revision that its worker has applied (None: it does not run), and how many it is behind."""

    vm: str
    zone: str | None
    parent: str | None
    firewall_rules: int
    applied: int | None
    lag: int
    problem: str


class DeadLetter(View, frozen=True):
    """A revision that a machine was not told: it was given up."""

    vm: str
    revision: int
    problem: str
    time: float


class DistributionView(View, frozen=True):
    """How the newest revision reaches the workers: who lags, what was given up, how quick it was."""

    revision: int
    targets: int
    lagging: list[str]
    queue: int
    queue_maximum: int
    broadcasts: int
    deliveries: int
    acknowledged: int
    failed: int
    success_rate: float | None
    dead_letters: list[DeadLetter]
    broadcast_median_ms: float | None
    vms: int = 0
    zones: int = 0


class Propagation(View, frozen=True):
    """How far the newest revision has come: in all, for each machine, for each zone."""

    status: DistributionView
    vms: list[LaggingVm]
    zones: list[LaggingZone]

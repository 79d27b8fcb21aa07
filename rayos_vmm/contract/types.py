"""The bodies, queries and answers of the API. The OpenAPI document is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rayos_vmm.config.firewall import RULES_MAXIMUM, FirewallRule
from rayos_vmm.config.spec import DISKS_MAXIMUM, SNAP_MAXIMUM, VmSpec
from rayos_vmm.config.units import Rate, Size, parse_rate
from rayos_vmm.machine.view import VmView
from rayos_vmm.policy.audit import RING, Entry
from rayos_vmm.policy.constraint import Constraints

Port = Annotated[int, Meta(ge=0, le=31, description="console port; 0 is the shell, 31 the serial line")]
Seconds = Annotated[float, Meta(gt=0, le=86400, description="time limit in seconds")]


class Create(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine to define, and whether to start it at once."""

    spec: VmSpec
    start: bool = False


class Stop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the guest may take to power down before QEMU is told to quit."""

    timeout_s: Seconds = 20.0


class ConsoleSize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The size of the terminal at the other end of a console."""

    port: Port = 0
    columns: Annotated[int, Meta(ge=1, le=65535)]
    rows: Annotated[int, Meta(ge=1, le=65535)]


class Exec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command for the guest: a line for its shell, or words that no shell touches."""

    command: (
        Annotated[str, Meta(min_length=1, max_length=65536)]
        | Annotated[list[str], Meta(min_length=1, max_length=1024)]
    )
    timeout_s: Seconds = 60.0


class DiskSize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which disk, and how large it is to be: not smaller than it is."""

    size: Size
    disk: Annotated[int, Meta(ge=0, lt=DISKS_MAXIMUM)] = 0


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether the cable is in the network card."""

    up: bool


class CaptureQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many bytes to keep of a frame, and after how many frames to end; absent means when the client leaves."""

    snap: Annotated[int, Meta(ge=1, le=SNAP_MAXIMUM)] = SNAP_MAXIMUM
    count: Annotated[int, Meta(ge=1)] | None = None


class Qmp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A QMP command; see the QEMU QMP Reference Manual."""

    command: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$", examples=["query-status"])]
    arguments: dict[str, Any] | None = None


class QmpReturn(msgspec.Struct, frozen=True, kw_only=True):
    """The value that QEMU returned."""

    return_: Any = msgspec.field(name="return")


class VmList(msgspec.Struct, frozen=True, kw_only=True):
    """All machines, by name."""

    vms: list[VmView]


class Leases(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses that our DHCP server has given out."""

    leases: list[dict[str, Any]]


class Rights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Capabilities by name, such as `CAP_NET`; `all` is every one."""

    capabilities: Annotated[list[Annotated[str, Meta(max_length=32)]], Meta(min_length=1, max_length=16)]


class AskConstraints(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Constraints of rights: ports such as `80` and `8000-8100`, a rate, disk requests at once, and whether use is
    recorded.
    """

    ports: Annotated[
        list[Annotated[str, Meta(pattern=r"^[0-9]{1,5}(-[0-9]{1,5})?$")]], Meta(max_length=16)
    ] = []
    bandwidth: Rate | None = None
    concurrent: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    audit: bool = False

    def constraints(self) -> Constraints:
        """As the policy takes them."""
        ranges = [[int(word) for word in text.split("-")] for text in self.ports]
        return Constraints(
            ports=tuple((one[0], one[-1]) for one in ranges),
            bandwidth=parse_rate(self.bandwidth) if self.bandwidth is not None else None,
            concurrent=self.concurrent,
            audit=self.audit,
        )


class AskGrant(Rights, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rights for a machine; without a time they last until they are revoked."""

    ttl_s: Annotated[float, Meta(gt=0, le=366 * 86400)] | None = None
    reason: Annotated[str, Meta(max_length=200)] = ""
    constraints: AskConstraints = AskConstraints()


class AskDelegation(Rights, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rights to pass on; they last no longer than those that they come from."""

    to: Annotated[str, Meta(max_length=32)]
    ttl_s: Annotated[float, Meta(gt=0, le=366 * 86400)] | None = None
    constraints: AskConstraints = AskConstraints()


class Grants(msgspec.Struct, frozen=True, kw_only=True):
    """Grants; those taken away are told as they were."""

    grants: list[dict[str, Any]]


class GrantsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of which machine; absent means of all."""

    vm: str | None = None


class AuditQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many of the last records."""

    limit: Annotated[int, Meta(ge=1, le=RING)] = 100


class AuditRecords(msgspec.Struct, frozen=True, kw_only=True):
    """Audit records, oldest first, and how many were lost since the service started."""

    records: list[Entry]
    lost: int


class AskRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of a machine's own firewall rules."""

    rules: Annotated[list[FirewallRule], Meta(max_length=RULES_MAXIMUM)]


class AskPacket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A packet in words."""

    packet: Annotated[
        str, Meta(min_length=1, max_length=200, examples=["out tcp 10.86.0.2:4000 > 93.184.216.34:80"])
    ]


class CountedRule(msgspec.Struct, frozen=True, kw_only=True):
    """A rule, where it comes from, and how many frames it decided; None while that cannot be told."""

    origin: str
    rule: FirewallRule
    hits: int | None


class FirewallRules(msgspec.Struct, frozen=True, kw_only=True):
    """Rules in the order of their levels; they are looked at by priority."""

    rules: list[CountedRule]


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """The revision that every frame is judged by from now on."""

    revision: int


class AuditKey(msgspec.Struct, frozen=True, kw_only=True):
    """The public half of the key that signs the record's checkpoints (PEM)."""

    public: str


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The error (`code` for programs), and the way out of it (`hint` may be empty)."""

    code: str
    message: str
    hint: str = ""


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorBody


class PortQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which console."""

    port: Port = 0


class TimedQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which console, from where, and whether to go on at the present."""

    port: Port = 0
    since: Annotated[int, Meta(ge=0)] = 0
    follow: bool = False


class ConsolePorts(msgspec.Struct, frozen=True, kw_only=True):
    """The ports: number, name, whether a program has it open, its size, its writer and how many watch."""

    ports: list[dict[str, Any]]


class StreamQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which console, and from where: 0 replays what is kept, absent means from now on.

    `mode`: write unless somebody else does, only watch, or take over from whoever writes.
    """

    mode: Literal["write", "watch", "take"] = "write"

    port: Port = 0
    since: Annotated[int, Meta(ge=0)] | None = None


class EventsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From which event on: `since` was the last one seen, absent means from now on."""

    since: Annotated[int, Meta(ge=0)] | None = None


class FileQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file in the guest."""

    path: Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^/")]


class PutQuery(FileQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file in the guest, and its permission bits when it is written (decimal)."""

    mode: Annotated[int, Meta(ge=0, le=0o7777)] = 0o644


class WaitQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The state to wait for, and the time limit."""

    for_: Literal["ready", "running", "stopped"] = msgspec.field(name="for", default="ready")
    timeout_s: Seconds = 60.0

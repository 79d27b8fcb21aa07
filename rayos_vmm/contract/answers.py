"""Answers of the API for which the service has no struct of its own, and the body of every error."""

from __future__ import annotations

from typing import Any

import msgspec

from rayos_vmm.config.firewall import FirewallRule
from rayos_vmm.guest.view import ConsolePort, DeviceView, InputDevice, MachineFigures
from rayos_vmm.machine.view import VmView
from rayos_vmm.network.view import Lease
from rayos_vmm.policy.audit import Entry
from rayos_vmm.policy.gatekeeper import Issued
from rayos_vmm.policy.revisions import Revision
from rayos_vmm.policy.view import Decisions, GrantView, PolicyStatus, Propagation, Usage, Zone
from rayos_vmm.service.balance import BalanceStatus

# -- machines, guests and rights -----------------------------------------------------------------------------


class QmpReturn(msgspec.Struct, frozen=True, kw_only=True):
    """The value that QEMU returned."""

    return_: Any = msgspec.field(name="return")


class VmList(msgspec.Struct, frozen=True, kw_only=True):
    """All machines, by name."""

    vms: list[VmView]


class Leases(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses that our DHCP server has given out."""

    leases: list[Lease]


class Grants(msgspec.Struct, frozen=True, kw_only=True):
    """Grants; those taken away are told as they were."""

    grants: list[GrantView]


class Security(PolicyStatus, frozen=True):
    """How much there is of everything that has a limit; tokens and decisions, too."""

    tokens: Usage
    decisions: Decisions


class Scalability(Propagation, frozen=True):
    """How far the newest revision has come, and how evenly the workers are spread."""

    balance: BalanceStatus


class AuditRecords(msgspec.Struct, frozen=True, kw_only=True):
    """Audit records, oldest first, and how many were lost since the service started."""

    records: list[Entry]
    lost: int


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


class SetAside(msgspec.Struct, frozen=True, kw_only=True):
    """The folder, in the state directory, that holds a damaged audit record as it was."""

    folder: str


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The error (`code` for programs), and the way out of it (`hint` may be empty)."""

    code: str
    message: str
    hint: str = ""


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorBody


class ConsolePorts(msgspec.Struct, frozen=True, kw_only=True):
    """The ports: number, name, whether a program has it open, its size, its writer and how many watch."""

    ports: list[ConsolePort]


# -- devices -------------------------------------------------------------------------------------------------


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """Devices with their counters, latencies, denials, queue depth and limits."""

    devices: list[DeviceView]


class Machines(msgspec.Struct, frozen=True, kw_only=True):
    """Running machines, each with its level, its last two samples and its devices."""

    machines: list[MachineFigures]


# -- input ---------------------------------------------------------------------------------------------------


class InputDevices(msgspec.Struct, frozen=True, kw_only=True):
    """The input devices: lights, what is held down, what waits for the guest, what was dropped."""

    devices: list[InputDevice]


class InputTaken(msgspec.Struct, frozen=True, kw_only=True):
    """The keyboard that took the keys: `virtio`, which is ours, or `ps2` or `usb`, which the guest may not read."""

    to: str


# -- the policy document -------------------------------------------------------------------------------------


class History(msgspec.Struct, frozen=True, kw_only=True):
    """The revisions that are kept, oldest first."""

    revisions: list[Revision]


class Zones(msgspec.Struct, frozen=True, kw_only=True):
    """All zones, by name."""

    zones: list[Zone]


# -- tokens --------------------------------------------------------------------------------------------------


class NewToken(msgspec.Struct, frozen=True, kw_only=True):
    """The token, which nobody can show again, and what is remembered of it."""

    token: str
    issued: Issued


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens that hold."""

    tokens: list[Issued]


# -- TPMs ----------------------------------------------------------------------------------------------------


class Extended(msgspec.Struct, frozen=True, kw_only=True):
    """The register that an event went into."""

    pcr: int


class Unsealed(msgspec.Struct, frozen=True, kw_only=True):
    """The secret that the TPM had sealed."""

    secret: bytes


class Pcrs(msgspec.Struct, frozen=True, kw_only=True):
    """SHA-256 registers by number, in hexadecimal."""

    pcrs: dict[str, str]


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """One line for each change of a register, then the values that these lead to."""

    lines: list[str]

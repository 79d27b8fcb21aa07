"""The policy document: rules of the host, of zones and of machines, and who belongs where. TOML or JSON, the same keys.

    [host.rules.no-mail]                [vm.web]
    kind = "firewall"                   zone = "lab"
    action = "deny"                     parent = "base"
    protocol = "tcp"
    ports = 25                          [vm.web.rules.no-mail]
                                        kind = "firewall"
    [zone.lab.rules.slow]               mode = "override"
    kind = "resource"                   action = "reject"
    net_rate = "10Mbit/s"               protocol = "tcp"
                                        ports = 25

Invariant: what `parse` returns has every key known, every value in its limits and every count within the table below;
whether the machines' places make sense is for `hierarchy.compile`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from rayos_vmm.config import firewall as config
from rayos_vmm.config.firewall import OwnedRule
from rayos_vmm.config.load import Table, explain
from rayos_vmm.config.spec import NAME_PATTERN, CapabilityName, Name, is_name
from rayos_vmm.config.units import Rate, Size
from rayos_vmm.errors import Invalid

#: The limits of one document.
ZONES_MAXIMUM: Final = 16
MACHINES_MAXIMUM: Final = 64
RULES_MAXIMUM: Final = 256  # of one zone, of the host, of one machine
FIREWALL_RULES_MAXIMUM: Final = 2048  # of the whole document
DOCUMENT_MAXIMUM_BYTES: Final = 1 << 20

Mode = Literal["inherit", "override"]
_Word = Annotated[str, Meta(max_length=64)]
_Port = Annotated[int, Meta(ge=0, le=65535)]
_Ports = _Port | _Word | Annotated[list[_Port | _Word], Meta(max_length=64)]
_Networks = _Word | Annotated[list[_Word], Meta(max_length=64)]
_Capabilities = Annotated[list[CapabilityName], Meta(max_length=16)]


class _Rule(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="kind",
):
    """The fields that every rule has; `kind` is the tag of its struct."""

    mode: Mode = "inherit"


class FirewallRule(_Rule, frozen=True, tag="firewall"):
    """A rule for packets, with the keys of a machine's own rules (`config.firewall`), `vm:` and `zone:` words too."""

    action: Literal["allow", "deny", "reject"]
    direction: Literal["in", "out"] | UnsetType = UNSET
    protocol: Annotated[int, Meta(ge=0, le=255)] | _Word | UnsetType = UNSET
    from_: _Networks | UnsetType = msgspec.field(name="from", default=UNSET)
    to: _Networks | UnsetType = UNSET
    from_ports: _Ports | UnsetType = UNSET
    ports: _Ports | UnsetType = UNSET
    priority: Annotated[int, Meta(ge=0, le=65535)] = 100
    log: bool = False
    audit_only: bool = False

    def compiled(self, name: str, origin: str) -> OwnedRule:
        """As the firewall takes it, under its own name."""
        table = msgspec.to_builtins(self)
        table = {key: table[key] for key in table if key not in ("kind", "mode")}
        return OwnedRule(origin, msgspec.convert({**table, "name": name}, config.FirewallRule))


class CapabilityRule(_Rule, frozen=True, tag="capability"):
    """Narrows what grants give: to those of `allow` (where it is there), and never to those of `deny`."""

    allow: _Capabilities | UnsetType = UNSET
    deny: _Capabilities = []


class ResourceRule(_Rule, frozen=True, tag="resource"):
    """Caps the quotas of machines; the least of all that are inherited holds."""

    net_rate: Rate | UnsetType = UNSET
    gpu_memory: Size | UnsetType = UNSET
    disk: Size | UnsetType = UNSET
    input_queue: Annotated[int, Meta(ge=1, le=65536)] | UnsetType = UNSET


PolicyRule = FirewallRule | CapabilityRule | ResourceRule
Rules = dict[str, PolicyRule]


class Level(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The host or a zone: its rules by name."""

    rules: Rules = {}


class Member(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A machine: the zone and the parent that it is in, and rules of its own."""

    zone: Name | None = None
    parent: Name | None = None
    rules: Rules = {}


class Document(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A whole policy."""

    host: Level = Level()
    zone: dict[str, Level] = {}
    vm: dict[str, Member] = {}


def load(text: str) -> Table:
    """The tables of a file: JSON when it begins with a brace, else TOML.

    Raises:
        Invalid: it is neither, or too long.
    """
    if len(text) > DOCUMENT_MAXIMUM_BYTES:
        raise Invalid(f"a policy of {len(text)} characters; at most {DOCUMENT_MAXIMUM_BYTES} are allowed")
    try:
        data = msgspec.json.decode(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except msgspec.DecodeError as error:
        raise Invalid(f"not JSON: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise Invalid(f"not TOML: {error}") from None
    return dict(data)


def parse(data: Mapping[str, Any]) -> Document:
    """The document in these tables.

    Raises:
        Invalid: with the path of the first key that is wrong, such as `zone.lab.rules.slow.net_rate`.
    """
    _only(data, "", ("host", "zone", "vm"))
    zones = _tables(data, "zone", ZONES_MAXIMUM)
    machines = _tables(data, "vm", MACHINES_MAXIMUM)
    document = Document(
        host=_level(data.get("host", {}), "host"),
        zone={name: _level(table, f"zone.{name}") for name, table in zones.items()},
        vm={name: _member(table, f"vm.{name}") for name, table in machines.items()},
    )
    check(document)
    return document


def check(document: Document) -> None:
    """The counts that a change can pass. Raises Invalid."""
    for what, table, limit in (
        ("zone", document.zone, ZONES_MAXIMUM),
        ("vm", document.vm, MACHINES_MAXIMUM),
    ):
        if len(table) > limit:
            raise Invalid(f"{what}: {len(table)} tables; at most {limit} are allowed")
    count = count_firewall_rules(document)
    if count > FIREWALL_RULES_MAXIMUM:
        raise Invalid(f"{count} firewall rules in all; at most {FIREWALL_RULES_MAXIMUM} are allowed")


def count_firewall_rules(document: Document) -> int:
    """In all of its levels."""
    levels: list[Level | Member] = [document.host, *document.zone.values(), *document.vm.values()]
    return sum(isinstance(rule, FirewallRule) for level in levels for rule in level.rules.values())


def _only(table: Mapping[str, Any], path: str, keys: tuple[str, ...]) -> None:
    for key in table:
        if key not in keys:
            raise Invalid(f"{path}{key}: there is no such key; allowed are {', '.join(keys)}")


def _tables(data: Mapping[str, Any], key: str, limit: int) -> Table:
    tables = _table(data.get(key, {}), key)
    if len(tables) > limit:
        raise Invalid(f"{key}: {len(tables)} tables; at most {limit} are allowed")
    for name in tables:
        _check_name(f"{key}.{name}", name)
    return tables


def _check_name(path: str, name: str) -> None:
    if not is_name(name):
        raise Invalid(f"{path[:200]}: a name matches {NAME_PATTERN}")


def _table(value: Any, path: str) -> Table:
    if not isinstance(value, dict):
        raise Invalid(f"{path}: a table is needed")
    return value


def _level(value: Any, path: str) -> Level:
    table = _table(value, path)
    _only(table, f"{path}.", ("rules",))
    return Level(rules=_rules(table, path))


def _member(value: Any, path: str) -> Member:
    table = _table(value, path)
    _only(table, f"{path}.", ("zone", "parent", "rules"))
    place = {key: table[key] for key in ("zone", "parent") if key in table}
    try:
        return msgspec.structs.replace(msgspec.convert(place, Member), rules=_rules(table, path))
    except msgspec.ValidationError as error:
        raise Invalid(explain(error, path, place)) from None


def _rules(table: Mapping[str, Any], path: str) -> Rules:
    path = f"{path}.rules"
    rules = _table(table.get("rules", {}), path)
    if len(rules) > RULES_MAXIMUM:
        raise Invalid(f"{path}: {len(rules)} rules; at most {RULES_MAXIMUM} are allowed")
    return {name: _rule(name, rule, f"{path}.{name}") for name, rule in rules.items()}


def _rule(name: str, value: Any, path: str) -> PolicyRule:
    _check_name(path, name)
    table = _table(value, path)
    try:
        rule: PolicyRule = msgspec.convert(table, PolicyRule)
        if isinstance(rule, FirewallRule):
            config.check_rules([rule.compiled(name, "").rule])
    except msgspec.ValidationError as error:
        raise Invalid(explain(error, path, table)) from None
    except Invalid as error:
        raise Invalid(f"{path}: {error.message.removeprefix(f'firewall.rules[0]: rule {name}: ')}") from None
    return rule


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One path, such as `zone.lab.rules.slow`: added, removed, or with another value."""

    path: str
    what: Literal["added", "removed", "changed"]
    before: Any = None
    after: Any = None


def _parts(document: Document) -> Table:
    parts: Table = {f"host.rules.{name}": rule for name, rule in document.host.rules.items()}
    for zone, level in document.zone.items():
        parts[f"zone.{zone}"] = {}
        parts |= {f"zone.{zone}.rules.{name}": rule for name, rule in level.rules.items()}
    for vm, member in document.vm.items():
        parts[f"vm.{vm}"] = {"zone": member.zone, "parent": member.parent}
        parts |= {f"vm.{vm}.rules.{name}": rule for name, rule in member.rules.items()}
    return {path: msgspec.to_builtins(part) for path, part in parts.items()}


def difference(before: Document, after: Document) -> list[Change]:
    """Every path that differs, in the order of the paths."""
    old, new = _parts(before), _parts(after)
    return [
        Change(
            path=path,
            what="added" if path not in old else "removed" if path not in new else "changed",
            before=old.get(path),
            after=new.get(path),
        )
        for path in sorted({*old, *new})
        if path not in old or path not in new or old[path] != new[path]
    ]

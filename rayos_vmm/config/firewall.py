"""A machine's firewall as it is written down: in TOML, in the API, in the store.

A rule's addresses are addresses, networks, `vm:NAME` or `zone:NAME`; the service puts addresses in the place of names
whenever a lease changes. What a rule then means, and in which order rules are looked at, is
`rayos_net.firewall.rule`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from rayos_net.firewall.rule import RuleError, parse
from rayos_vmm.errors import Invalid

RULES_MAXIMUM: Final = 2048
#: Prefixes of names that stand for addresses.
VM: Final = "vm:"
ZONE: Final = "zone:"
_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"

#: The addresses of the machines that a `vm:` or `zone:` word stands for, as CIDR. Raises Invalid for an unknown one.
Lookup = Callable[[str], Iterable[str]]
Words = str | list[str]
Ports = int | str | list[int | str]


RuleName = Annotated[str, Meta(pattern=_NAME, description="1 to 63 of letters, digits, ., _ and -")]


class FirewallRule(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}
):
    """One rule. What is left out is any; `priority` lowest first, then as they stand in the list."""

    name: RuleName
    action: Literal["allow", "deny", "reject"]
    direction: Annotated[Literal["in", "out"] | None, Meta(description="seen from the guest")] = None
    protocol: str | int | None = None
    from_: Words | None = None
    to: Words | None = None
    from_ports: Ports | None = None
    ports: Ports | None = None
    priority: Annotated[int, Meta(ge=0, le=65535)] = 100
    log: bool = False
    audit_only: Annotated[bool, Meta(description="only counted and told, never obeyed")] = False


#: What a rule is called in its table, and here; without its name.
_FIELDS: Final = tuple(
    (one.encode_name, one.name) for one in msgspec.structs.fields(FirewallRule) if one.name != "name"
)


class FirewallConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rules of one machine, and what it may claim to be beside its lease."""

    guard: Annotated[bool, Meta(description="the spoof guard; off, the guest may claim anything")] = True
    addresses: Annotated[
        list[str], Meta(max_length=16, description="IPv4 addresses that the guest may use without a lease")
    ] = []
    rules: Annotated[list[FirewallRule], Meta(max_length=RULES_MAXIMUM)] = []


class OwnedRule(msgspec.Struct, frozen=True):
    """A rule and where it comes from: `vm:NAME`, `zone:NAME`, `host` or `default`."""

    origin: str
    rule: FirewallRule


def check_firewall(config: FirewallConfig, known: Sequence[FirewallRule] = ()) -> None:
    """Whether the rules make sense one by one, and have names of their own. Those in `known` were checked before.

    Raises:
        Invalid: with the rule's place, what was seen and what is allowed.
    """
    for index, text in enumerate(config.addresses):
        try:
            if ip_address(text).version != 4:
                raise ValueError(f"{text!r} is not an IPv4 address")
        except ValueError as error:
            raise Invalid(f"firewall.addresses[{index}]: {error}") from None
    check_rules(config.rules, known)


def check_rules(rules: Sequence[FirewallRule], known: Sequence[FirewallRule] = ()) -> None:
    """As `check_firewall`, for a list of rules."""
    seen: set[str] = set()
    if len(rules) > RULES_MAXIMUM:
        raise Invalid(f"{len(rules)} rules; at most {RULES_MAXIMUM} are allowed")
    sound = {rule.name: rule for rule in known}
    for index, rule in enumerate(rules):
        if rule.name in seen:
            raise Invalid(f"firewall.rules[{index}]: there is a rule {rule.name} already")
        seen.add(rule.name)
        if sound.get(rule.name) == rule:
            continue
        table = resolve(rule, lambda word: ["192.0.2.1/32"])
        try:
            parse(rule.name, {} if table is None else table)
        except RuleError as error:
            raise Invalid(f"firewall.rules[{index}]: {error}") from None


def resolve(rule: FirewallRule, lookup: Lookup) -> dict[str, Any] | None:
    """The rule as `rayos_net.firewall.rule.parse` takes it; None when a side of it stands for no address now.

    Raises what `lookup` raises.
    """
    given = ((key, getattr(rule, field)) for key, field in _FIELDS)
    table = {
        key: value for key, value in given if value is not None and value is not False
    }  # 0 is a priority
    for side in ("from", "to"):
        if side not in table:
            continue
        words = [table[side]] if isinstance(table[side], str) else table[side]
        found: list[str] = []
        for word in words:
            found += lookup(word) if word.startswith((VM, ZONE)) else [word]
        if not found:
            return None
        table[side] = found
    return table


def names(rules: Iterable[FirewallRule]) -> set[str]:
    """The `vm:` and `zone:` words in these rules."""
    found = set()
    for rule in rules:
        for side in (rule.from_, rule.to):
            words = [side] if isinstance(side, str) else side or []
            found |= {word for word in words if word.startswith((VM, ZONE))}
    return found

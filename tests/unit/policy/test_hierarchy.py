"""Host, zone, parents, machine: what is inherited, what is overridden, and what a document may not say."""

from __future__ import annotations

from typing import Any

import pytest

from rayos_vmm.config.spec import Quota
from rayos_vmm.errors import Invalid
from rayos_vmm.policy.capability import Capability, names
from rayos_vmm.policy.document import Document, difference, load, parse
from rayos_vmm.policy.hierarchy import Effective, Place, compile_policy

DOCUMENT = """
[host.rules.no-mail]
kind = "firewall"
action = "deny"
protocol = "tcp"
ports = 25

[host.rules.no-gpu]
kind = "capability"
deny = ["CAP_GPU"]

[zone.lab.rules.web]
kind = "firewall"
action = "allow"
direction = "in"
protocol = "tcp"
ports = [80, "8000-8100"]
priority = 50

[zone.lab.rules.slow]
kind = "resource"
net_rate = "10Mbit/s"
input_queue = 32

[vm.a]
zone = "lab"
[vm.a.rules.only-net]
kind = "capability"
allow = ["CAP_NET", "CAP_DISK_R", "CAP_GPU"]

[vm.b]
parent = "a"
[vm.b.rules.no-mail]
kind = "firewall"
mode = "override"
action = "reject"
protocol = "tcp"
ports = 25
[vm.b.rules.slower]
kind = "resource"
net_rate = "1Mbit/s"

[vm.c]
parent = "b"
[vm.c.rules.no-gpu]
kind = "capability"
mode = "override"

[vm.d]
parent = "c"
[vm.d.rules.slow]
kind = "resource"
mode = "override"
disk = "1GiB"
"""


def compiled(text: str, places: dict[str, Place] | None = None) -> dict[str, Effective]:
    return compile_policy(parse(load(text)), places or {})


def firewall(effective: Effective) -> list[tuple[str, str, str]]:
    return [(owned.rule.name, owned.rule.action, owned.origin) for owned in effective.firewall]


def test_a_machine_inherits_down_to_the_fourth_of_a_line() -> None:
    """Firewall by priority, capabilities by AND, limits by the least, each with its origin."""
    found = compiled(DOCUMENT)
    a, b, c, d = (found[name] for name in "abcd")
    assert d.levels == ("host", "zone:lab", "vm:a", "vm:b", "vm:c", "vm:d") and d.zone == "lab"
    assert firewall(a) == [("web", "allow", "zone:lab"), ("no-mail", "deny", "host")]
    assert firewall(d) == [("web", "allow", "zone:lab"), ("no-mail", "reject", "vm:b")]
    assert a.firewall[0].rule.ports == [80, "8000-8100"]
    assert names(a.capabilities) == ["CAP_NET", "CAP_DISK_R"]
    assert a.taken["CAP_GPU"] == "host/no-gpu" and a.taken["CAP_INPUT"] == "vm:a/only-net"
    assert Capability.CAP_GPU in c.capabilities and c.capabilities == d.capabilities
    assert a.limits == {"net_rate": ("10Mbit/s", "zone:lab/slow"), "input_queue": (32, "zone:lab/slow")}
    assert b.limits["net_rate"] == ("1Mbit/s", "vm:b/slower")
    assert "input_queue" not in d.limits and d.limits["disk"] == ("1GiB", "vm:d/slow")


def test_a_limit_caps_a_quota_and_never_raises_it() -> None:
    found = compiled(DOCUMENT)["d"]
    assert found.cap(Quota()) == Quota(net_rate="1Mbit/s", disk="1GiB")
    assert found.cap(Quota(net_rate="500kbit/s", disk="1MiB")) == Quota(net_rate="500kbit/s", disk="1MiB")


def test_a_specification_places_a_machine_where_the_document_is_silent() -> None:
    found = compiled(
        DOCUMENT, {"e": Place(parent="a"), "f": Place(zone="lab"), "g": Place(), "a": Place("x")}
    )
    assert found["e"].levels == ("host", "zone:lab", "vm:a")
    assert found["f"].levels == ("host", "zone:lab") and found["g"].levels == ("host",)
    assert found["a"].zone == "lab"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[hosts]", "hosts: there is no such key"),
        ("[zone.lab]\nport = 1", "zone.lab.port: there is no such key"),
        ('[zone.lab.rules.x]\nkind = "magic"', r"zone.lab.rules.x.kind = 'magic'"),
        (
            '[zone.lab.rules.x]\nkind = "firewall"\naction = "deny"\nport = 1',
            "zone.lab.rules.x.port: there is no such key",
        ),
        (
            '[host.rules.x]\nkind = "firewall"\naction = "deny"\nports = "80-20"\nprotocol = "tcp"',
            "host.rules.x: ports 80-20 are not a range",
        ),
        (
            '[host.rules.x]\nkind = "firewall"\naction = "deny"\nports = 1',
            "host.rules.x: ports need a protocol",
        ),
        (
            '[host.rules.x]\nkind = "firewall"\naction = "deny"\nfrom = "10.0.0.1/8"',
            "host.rules.x: .*host bits",
        ),
        ('[host.rules.x]\nkind = "resource"\nnet_rate = "fast"', "host.rules.x.net_rate = 'fast': a rate is"),
        (
            '[host.rules.x]\nkind = "capability"\ndeny = ["CAP_ADMIN"]',
            r"host.rules.x.deny\[0\] = 'CAP_ADMIN'",
        ),
        ("[zone.A]", r"zone.A: a name"),
        (
            '[host.rules.x]\nkind = "firewall"\naction = "deny"\nto = "zone:no"',
            "host.rules.x: there is no zone:no",
        ),
        ('[vm.a]\nzone = "lab"', "vm.a.zone = 'lab': there is no such zone"),
        ('[vm.a]\nparent = "b"', "vm.a.parent = 'b': there is no such machine"),
        ('[vm.a]\nparent = "b"\n[vm.b]\nparent = "a"', "vm.b.parent = 'a': a circle, a <- b <- a"),
        ('[vm.a]\nparent = "a"', "vm.a.parent = 'a': a circle"),
        (
            '[zone.x]\n[zone.y]\n[vm.a]\nzone = "x"\n[vm.b]\nparent = "a"\nzone = "y"',
            "vm.b.zone = 'y': its parent is in zone 'x'",
        ),
        (
            '[host.rules.x]\nkind = "resource"\n[zone.lab.rules.x]\nkind = "resource"',
            "zone.lab.rules.x: host has a rule of this name",
        ),
        (
            '[zone.lab.rules.x]\nkind = "resource"\nmode = "override"',
            "zone.lab.rules.x: it overrides a rule that no level above has",
        ),
        (
            '[host.rules.x]\nkind = "resource"\n[vm.a.rules.x]\nkind = "capability"\nmode = "override"',
            "vm.a.rules.x: it overrides a rule of another kind",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_path(text: str, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        compiled(text)


def _rules(count: int, **more: Any) -> dict[str, Any]:
    rule = {"kind": "firewall", "action": "deny", **more}
    return {"rules": {f"r{number}": rule for number in range(count)}}


def test_limits_of_the_source_hold() -> None:
    """16 zones, 64 machines, 256 rules each, 2,048 firewall rules in all; one more is refused."""
    full = {"zone": {f"z{n}": _rules(128) for n in range(16)}, "vm": {f"v{n}": {} for n in range(64)}}
    assert len(compile_policy(parse(full), {})) == 64
    with pytest.raises(Invalid, match="2049 firewall rules in all; at most 2048"):
        parse({**full, "host": _rules(1)})
    with pytest.raises(Invalid, match="zone: 17 tables; at most 16"):
        parse({"zone": {f"z{n}": {} for n in range(17)}})
    with pytest.raises(Invalid, match="vm: 65 tables; at most 64"):
        parse({"vm": {f"v{n}": {} for n in range(65)}})
    for path, data in (("host", {"host": _rules(257)}), ("zone.a", {"zone": {"a": _rules(257)}})):
        with pytest.raises(Invalid, match=rf"{path}.rules: 257 rules; at most 256"):
            parse(data)
    parse({"zone": {"a": _rules(256)}})
    line = {"v0": {}, **{f"v{n}": {"parent": f"v{n - 1}"} for n in range(1, 8)}}
    assert len(compile_policy(parse({"vm": line}), {})) == 8
    with pytest.raises(Invalid, match="more than 8 machines"):
        compile_policy(parse({"vm": {**line, "v8": {"parent": "v7"}}}), {})


def test_a_difference_names_every_path() -> None:
    before = parse(load(DOCUMENT))
    changed = load(DOCUMENT)
    del changed["vm"]["d"], changed["zone"]["lab"]["rules"]["web"]
    changed["zone"]["lab"]["rules"]["slow"]["input_queue"] = 8
    changed["zone"]["new"] = {}
    found = difference(before, parse(changed))
    assert [(change.what, change.path) for change in found] == [
        ("removed", "vm.d"),
        ("removed", "vm.d.rules.slow"),
        ("changed", "zone.lab.rules.slow"),
        ("removed", "zone.lab.rules.web"),
        ("added", "zone.new"),
    ]
    assert found[2].before["input_queue"] == 32 and found[2].after["input_queue"] == 8
    assert difference(before, before) == [] and difference(Document(), Document()) == []

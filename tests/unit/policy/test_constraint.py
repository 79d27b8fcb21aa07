"""Constraints: what a delegation may not widen, what several grants come to, that no right rises before they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayos_devices.gate import Op
from rayos_net.firewall.rule import Action, parse
from rayos_net.firewall.table import Table as Firewall
from rayos_vmm.config.firewall import resolve
from rayos_vmm.errors import Conflict, GuestGone
from rayos_vmm.policy.authority import open_authority
from rayos_vmm.policy.capability import Capability
from rayos_vmm.policy.constraint import CONSTRAINTS_MAXIMUM, NO_CONSTRAINTS, Constraints, bounds, port_rules
from rayos_vmm.policy.grant import Moment
from rayos_vmm.policy.table import Denied, Table
from tests.unit.policy.test_authority import Memory, gate

NET, DISK, INPUT = Capability.CAP_NET, Capability.CAP_DISK_W, Capability.CAP_INPUT
NOW = Moment(1000.0, 10.0, "boot")
ranges = st.lists(
    st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(lambda pair: (min(pair), max(pair))),
    max_size=4,
).map(tuple)
some = st.builds(
    Constraints,
    ports=ranges,
    bandwidth=st.none() | st.integers(8000, 10**9),
    concurrent=st.none() | st.integers(1, 100),
    audit=st.booleans(),
)


def allows(limits: Constraints, port: int) -> bool:
    return not limits.ports or any(first <= port <= last for first, last in limits.ports)


@given(parent=some, child=some, port=st.integers(0, 65535))
def test_what_is_within_allows_nothing_more(parent: Constraints, child: Constraints, port: int) -> None:
    inherited = child.under(parent)
    if inherited.is_within(parent):
        assert allows(parent, port) or not allows(inherited, port)
        assert parent.bandwidth is None or (inherited.bandwidth or 10**10) <= parent.bandwidth
        assert parent.concurrent is None or (inherited.concurrent or 101) <= parent.concurrent
        assert inherited.audit or not parent.audit
    assert NO_CONSTRAINTS.under(parent).is_within(parent) and parent.is_within(parent)


@given(ports=ranges, protocol=st.integers(0, 255), port=st.integers(0, 65535))
def test_the_firewall_lets_through_what_the_ports_say(
    ports: tuple[tuple[int, int], ...], protocol: int, port: int
) -> None:
    """Judged by the compiled table: TCP and UDP by port, ICMP always, other protocols never."""
    rules = []
    for owned in port_rules(ports, "grants"):
        table = resolve(owned.rule, lambda _: [])
        assert table is not None
        rules.append(parse(owned.rule.name, table))
    firewall = Firewall(rules)
    for outgoing in (True, False):
        number, _ = firewall.plane(outgoing=outgoing, version=4).find(protocol, 1, 2, 7, port)
        is_denied = number >= 0 and firewall.rules[number].action is Action.DENY
        if not ports or protocol in (1, 58):
            assert not is_denied
        elif protocol in (6, 17):
            assert is_denied is not any(first <= port <= last for first, last in ports)
        else:
            assert is_denied


def test_of_several_grants_the_widest_counts_but_every_audit() -> None:
    web, dns = (
        Constraints(ports=((80, 80),), bandwidth=10_000),
        Constraints(ports=((53, 53),), bandwidth=20_000),
    )
    found = bounds([(NET, web), (NET | DISK, dns)])
    assert (found.ports, found.net, found.disk, found.audited) == (((53, 53), (80, 80)), 20_000, 20_000, 0)
    few = [(DISK, Constraints(concurrent=2)), (DISK, Constraints(concurrent=8))]
    assert bounds(few).at_once == 8 and bounds([*few, (DISK, NO_CONSTRAINTS)]).at_once is None
    assert bounds([(NET, web), (NET, NO_CONSTRAINTS)]).ports == ()
    assert bounds([(NET, web), (NET, NO_CONSTRAINTS)]).net is None
    assert bounds([(INPUT, NO_CONSTRAINTS), (NET, web)]).ports == ((80, 80),)
    audited = bounds([(NET, Constraints(audit=True)), (NET, NO_CONSTRAINTS), (DISK, web)]).audited
    assert audited == 1 << Op.NET_TX.index | 1 << Op.NET_RX.index | 1 << Op.NET_CONFIG.index


@pytest.mark.parametrize(
    ("rights", "limits", "words"),
    [
        (DISK, Constraints(ports=((80, 80),)), "ports limit CAP_NET"),
        (INPUT, Constraints(bandwidth=10_000), "none of these is among the rights"),
        (NET, Constraints(bandwidth=7999), "at least 8000"),
        (NET, Constraints(concurrent=4), "no other device works on more than one"),
        (DISK, Constraints(concurrent=0), "1 to 65536 are allowed"),
        (NET, Constraints(ports=((80, 79),)), "no range"),
        (NET, Constraints(ports=((1, 70000),)), "no range"),
        (NET, Constraints(ports=((1, 1),) * 17), "17 port ranges; at most 16"),
    ],
)
def test_constraints_that_make_no_sense(rights: Capability, limits: Constraints, words: str) -> None:
    table = Table()
    table.define("a", NET | DISK | INPUT)
    with pytest.raises(Denied, match=words):
        table.grant("a", rights, None, "", NOW, limits)


def test_a_delegation_is_within_what_it_comes_from() -> None:
    table = Table()
    for vm, rights in (("a", Capability(0)), ("b", Capability(0)), ("c", Capability(0))):
        table.define(vm, rights)
    web = Constraints(ports=((80, 80), (8000, 8100)), bandwidth=1_000_000, concurrent=8, audit=True)
    table.grant("a", NET | DISK, None, "", NOW, web)
    for wider in (
        Constraints(ports=((80, 81),)),
        Constraints(ports=((22, 22),)),
        Constraints(bandwidth=1_000_001),
        Constraints(concurrent=9),
    ):
        with pytest.raises(Denied, match="within these constraints"):
            table.delegate("a", "b", NET | DISK, None, NOW, wider)
    inherited = table.delegate("a", "b", NET, None, NOW)
    assert inherited.constraints == web.of(NET)
    narrow = table.delegate("b", "c", NET, None, NOW, Constraints(ports=((8000, 8001),), bandwidth=9000))
    assert narrow.constraints == Constraints(ports=((8000, 8001),), bandwidth=9000, audit=True)
    disk = table.delegate("a", "c", DISK, None, NOW)
    assert disk.constraints == Constraints(bandwidth=1_000_000, concurrent=8, audit=True)
    table.revoke(inherited.id, NOW)
    assert table.bounds("c").ports == () and table.holds("c") == DISK


def test_at_most_512_constraints() -> None:
    table = Table()
    table.define("a", NET)
    full = Constraints(ports=((1, 1),), bandwidth=8000, audit=True)
    for _ in range(CONSTRAINTS_MAXIMUM // 3):
        table.grant("a", NET, None, "", NOW, full)
    with pytest.raises(Denied, match="there are 510 constraints; at most 512"):
        table.grant("a", NET, None, "", NOW, full)
    table.grant("a", NET, None, "", NOW, Constraints(bandwidth=8000, audit=True))
    with pytest.raises(Denied, match="there are 512"):
        table.grant("a", NET, None, "", NOW, Constraints(audit=True))
    table.grant("a", NET, None, "", NOW)


async def test_a_right_rises_after_its_constraints_hold_or_not_at_all(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool, list[str]]] = []
    told: list[tuple[str, bool]] = []

    class Told:
        async def enforce(self, vm: str, has_other_ports: bool) -> None:
            rules = [owned.rule.name for owned in authority.port_rules(vm)]
            seen.append((page.allows(Op.NET_TX.index), has_other_ports, rules))
            if len(seen) > 1:
                raise GuestGone("its devices do not answer")

        def renew(self, vm: str, has_other_ports: bool) -> None:
            told.append((vm, has_other_ports))

    async with open_authority(Memory(), tmp_path / "audit.log", devices=Told()) as authority:
        await authority.define("a", [])
        authority.open("a", tmp_path, is_new=True)
        page = gate(tmp_path)
        first = await authority.grant("a", ["net"], 60, "", Constraints(ports=((80, 80),)))
        assert page.allows(Op.NET_TX.index)
        names = ["other-tcp-ports", "other-udp-ports", "no-ports"]
        assert seen == [(False, True, names)]
        with pytest.raises(GuestGone):
            await authority.grant("a", ["disk_r"], 60, "", Constraints(bandwidth=8000))
        assert not page.allows(Op.DISK_READ.index) and len(authority.grants()) == 2
        assert authority.records(1)[0].data["constraints"] == {"bandwidth": 8000}
        told.clear()
        await authority.revoke(first.id)
        assert told == [("a", True)] and not page.allows(Op.NET_TX.index)
        assert list(page.mask[1:5]) == [0, 0, 0, 0]
        with pytest.raises(Conflict, match="ports limit CAP_NET"):
            await authority.grant("a", ["gpu"], 60, "", Constraints(ports=((80, 80),)))


async def test_the_page_says_rates_and_what_is_recorded(tmp_path: Path) -> None:
    async with open_authority(Memory(), tmp_path / "audit.log") as authority:
        await authority.define("a", [])
        authority.open("a", tmp_path, is_new=True)
        page = gate(tmp_path)
        limits = Constraints(bandwidth=80_000, audit=True)
        await authority.grant("a", ["net", "disk_w"], 60, "", limits)
        _, revision, audited, net, disk = list(page.mask[:5])
        assert (revision, net, disk) == (0, 10_000, 10_000)
        assert audited >> Op.DISK_WRITE.index & 1 and audited >> Op.NET_RX.index & 1
        assert not audited >> Op.DISK_READ.index & 1
        await authority.grant("a", ["net"], 60, "")
        assert page.mask[3] == 0 and page.mask[4] == 10_000

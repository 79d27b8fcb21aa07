"""The compiled table gives the answer of a linear scan, for every rule set and packet; the fast path that of
the slow.
"""

import random
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_net.firewall.flow import FlowTable
from rayos_net.firewall.rule import WITH_PORTS, Action, Direction, Rule
from rayos_net.firewall.table import NO_RULE, Table
from rayos_net.firewall.verdict import GuestPort
from rayos_net.guard import Guard
from rayos_net.packet import Fault, parse
from tests.unit.net.frames import GATEWAY, GUEST, GUEST_MAC, arp, ether, ping, tcp, udp

HOSTS = [f"10.0.{n // 4}.{n % 4}" for n in range(12)]
NETWORKS = ["0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/30", "10.0.1.0/24", *(f"{host}/32" for host in HOSTS)]
PORTS = [0, 1, 22, 53, 80, 443, 1023, 1024, 8080, 65534, 65535]

networks = st.lists(st.sampled_from(NETWORKS).map(IPv4Network), max_size=2).map(tuple)
networks6 = st.lists(st.sampled_from(["fd00::/16", "fd00::1/128", "::/0"]).map(IPv6Network), max_size=1)
ranges = st.lists(
    st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS)).map(lambda pair: (min(pair), max(pair))),
    max_size=3,
)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    protocol = draw(st.sampled_from([None, 1, 6, 17, 47]))
    has_ports = protocol in WITH_PORTS
    return Rule(
        "r",
        draw(st.sampled_from(Action)),
        draw(st.sampled_from([None, Direction.OUT, Direction.IN])),
        protocol,
        draw(networks),
        draw(networks),
        tuple(draw(ranges)) if has_ports else (),
        tuple(draw(ranges)) if has_ports else (),
        draw(st.integers(0, 3)),
        audit_only=draw(st.integers(0, 9)) == 0,
    )


Question = tuple[bool, int, int, int, int, int]
questions = st.tuples(
    st.booleans(),
    st.sampled_from([1, 6, 17, 47, 99]),
    st.sampled_from([*HOSTS, "192.168.0.1", "255.255.255.255"]).map(lambda one: int(IPv4Address(one))),
    st.sampled_from([*HOSTS, "0.0.0.0"]).map(lambda one: int(IPv4Address(one))),
    st.sampled_from([*PORTS, 2, 79, 81]),
    st.sampled_from([*PORTS, 2, 79, 81]),
)


def scan(table: Table, outgoing: bool, packet: tuple[int, int, int, int, int]) -> int:
    """The reference: the first rule that matches, one after another."""
    protocol, source, destination, source_port, destination_port = packet

    def is_in(networks: tuple[object, ...], address: int) -> bool:
        own = [one for one in networks if isinstance(one, IPv4Network)]
        return not networks or any(IPv4Address(address) in one for one in own)

    def is_between(ranges: tuple[tuple[int, int], ...], port: int) -> bool:
        return not ranges or any(first <= port <= last for first, last in ranges)

    for number, rule in enumerate(table.rules):
        if (
            not rule.audit_only
            and rule.direction in (None, Direction.OUT if outgoing else Direction.IN)
            and rule.protocol in (None, protocol)
            and is_in(rule.source, source)
            and is_in(rule.destination, destination)
            and is_between(rule.source_ports, source_port)
            and is_between(rule.destination_ports, destination_port)
        ):
            return number
    return NO_RULE


@settings(max_examples=150, deadline=None)
@given(st.lists(rules(), max_size=60), st.lists(questions, min_size=1, max_size=40))
def test_the_table_is_a_linear_scan(some: list[Rule], asked: list[Question]) -> None:
    """Whatever layer a rule landed in, the first in order decides."""
    table = Table(some)
    for outgoing, *packet in asked:
        protocol, source, destination, source_port, port = packet
        plane = table.plane(outgoing=outgoing, version=4)
        found, _ = plane.find(protocol, source, destination, source_port, port)
        assert found == scan(table, outgoing, (protocol, source, destination, source_port, port))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(rules(), min_size=1, max_size=40),
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(["drop", "add", "move", "double"]), rules()), max_size=4
    ),
    st.lists(questions, min_size=1, max_size=30),
)
def test_a_table_made_of_its_predecessor_is_the_same(
    some: list[Rule], changes: list[tuple[int, str, Rule]], asked: list[Question]
) -> None:
    """Whatever changed between the two, taken over or worked out again: the answers are those of a new table."""
    table = Table(some)
    for at, what, rule in changes:
        place = at % len(some) if some else 0
        if what == "add":
            some = [*some[:place], rule, *some[place:]]
        elif what == "double":
            some = [*some, *some[place : place + 1]]
        else:
            rest = some[:place] + some[place + 1 :]
            some = rest if what == "drop" else [*rest, *some[place : place + 1]]
        table = Table(some, previous=table)
    new = Table(some)
    for outgoing, *packet in asked:
        protocol, source, destination, source_port, port = packet
        for version in (4, 6):
            for audit in (False, True):
                planes = [one.plane(outgoing=outgoing, version=version, audit=audit) for one in (table, new)]
                found = [plane.find(protocol, source, destination, source_port, port) for plane in planes]
                assert found[0] == found[1]


def test_a_large_table_is_a_linear_scan() -> None:
    """2,048 rules of every kind, where the hashes and all the bits are used."""
    chance = random.Random(5)
    some = [random_rule(chance, number) for number in range(2048)]
    table = Table(some)
    plane = table.plane(outgoing=True, version=4)
    assert plane.shapes
    assert plane.rest
    assert plane.deny_source or plane.deny_destination
    for _ in range(400):
        packet = random_packet(chance)
        assert plane.find(*packet)[0] == scan(table, True, packet)


def random_rule(chance: random.Random, number: int) -> Rule:
    host = IPv4Network(f"10.{chance.randrange(4)}.{chance.randrange(8)}.{chance.randrange(256)}/32")
    if number < 100:
        return Rule(f"bad{number}", Action.DENY, destination=(host,), priority=1)
    action = chance.choice([Action.ALLOW, Action.DENY])
    port = chance.randrange(65536)
    if chance.random() < 0.5:
        return Rule(f"exact{number}", action, None, 6, (), (host,), (), ((port, port),))
    network = host.supernet(new_prefix=chance.randrange(12, 31))
    ports = ((port // 2, port),)
    return Rule(f"range{number}", action, None, chance.choice([6, 17]), (), (network,), (), ports)


def random_packet(chance: random.Random) -> tuple[int, int, int, int, int]:
    address = f"10.{chance.randrange(4)}.{chance.randrange(8)}.{chance.randrange(256)}"
    source = int(IPv4Address("10.9.9.9"))
    return chance.choice([6, 17]), source, int(IPv4Address(address)), 1, chance.randrange(65536)


FRAMES = [
    ether(tcp(GUEST, 1, GATEWAY, 80)),
    ether(tcp(GUEST, 1, GATEWAY, 80, data=bytes(100))),
    ether(udp(GUEST, 1, GATEWAY, 53)),
    ether(udp(GUEST, 68, GATEWAY, 67, bytes(300))),
    ether(ping(GUEST, GATEWAY)),
    arp(GUEST, GATEWAY),
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(FRAMES),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=3),
    st.integers(0, 20),
    st.booleans(),
)
def test_fast_path_slow_path_and_explanation_agree(
    frame: bytes, changes: list[tuple[int, int]], cut: int, outgoing: bool
) -> None:
    """A frame that the fast path takes would get the same verdict from the full parse, and `explain` says it."""
    data = bytearray(frame)
    for at, value in changes:
        if at < len(data):
            data[at] = value
    changed = bytes(data[: len(data) - cut])
    mac = bytes.fromhex(GUEST_MAC.replace(":", ""))

    def port() -> GuestPort:
        guard = Guard(mac, addresses=[int(IPv4Address(GUEST))])
        some = [
            Rule("web", Action.DENY, None, 6, (), (), (), ((80, 80),)),
            Rule("dns", Action.REJECT, None, 17),
        ]
        return GuestPort(guard, FlowTable(Table(some)))

    fast, slow = port(), port()
    assert fast.check(changed, outgoing, 0.0) == slow._check_any(changed, outgoing, 0.0)
    assert fast.counters == slow.counters
    assert port().explain(changed, outgoing, 0.0).action == fast.check(changed, outgoing, 0.0)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120), st.sampled_from([b"\x08\x00", b"\x08\x06", b"\x86\xdd", b""]))
def test_any_bytes_are_a_packet_or_a_fault(data: bytes, ethertype: bytes) -> None:
    """The parser reads nothing outside and raises nothing; the packet's end lies in the frame."""
    frame = bytes(12) + ethertype + data
    packet = parse(frame)
    if not isinstance(packet, Fault):
        assert 14 <= packet.transport <= packet.end <= len(frame)

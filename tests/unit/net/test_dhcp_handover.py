"""rayos_net.dhcp.handover: the guest's side of a lease that is held elsewhere; and rayos_net.dhcp.exchange."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface

import pytest

from rayos_net.dhcp import message as wire
from rayos_net.dhcp.answer import Route
from rayos_net.dhcp.exchange import ENTRIES_MAX, PORTS_MAX
from rayos_net.dhcp.handover import ClientOrder, Give, Handover, Step
from rayos_net.dhcp.lease import FOREVER, Lease
from rayos_net.dhcp.message import Message, MessageType
from rayos_net.dhcp.server_action import Source
from tests.unit.net.dhcp_driver import NOW, Driver, mac, packed, request

UP = IPv4Address("192.0.2.1")
ADDRESS = "192.0.2.77"
OPTIONS = {
    1: packed("255.255.255.0"),
    3: UP.packed,
    6: packed("192.0.2.9"),
    42: packed("192.0.2.5"),
    51: b"\0\0\x0e\x10",
    53: b"\5",
    54: UP.packed,
}
LEASE = Lease(IPv4Interface(f"{ADDRESS}/24"), UP, NOW + 1800, NOW + 3150, NOW + 3600, options=OPTIONS)
DISCOVER, REQUEST = MessageType.DISCOVER, MessageType.REQUEST


@pytest.fixture
def core() -> Handover:
    """A guest, mac(1), without a lease yet."""
    return Handover(mac(1))


def ask(core: Handover, message: Message, now: float = NOW) -> list[Step]:
    """Returns the core's actions on a message."""
    return core.receive(message.encode(), now)


def answer(steps: list[Step]) -> Message:
    """The one reply."""
    (step,) = steps
    assert isinstance(step, Give)
    return wire.decode(step.reply.data)


def wants(**more: bytes) -> dict[int, bytes]:
    """A parameter list with NTP, and the options named `oN`."""
    return {55: bytes((1, 3, 6, 42)), **{int(name[1:]): value for name, value in more.items()}}


def test_a_discover_waits_for_the_lease_and_time_runs_with_ours(core: Handover) -> None:
    """The reply is the upstream lease: server, options, and what is left of the time, rounded down."""
    assert ask(core, request(DISCOVER, options=wants())) == [ClientOrder.START]
    offer = answer(core.hold(LEASE, NOW + 0.4))
    assert (offer.yiaddr, offer.options[54], offer.options[42]) == (
        int(IPv4Address(ADDRESS)),
        UP.packed,
        OPTIONS[42],
    )
    assert int.from_bytes(offer.options[51], "big") == 3599
    ack = answer(ask(core, request(REQUEST, options=wants(o50=packed(ADDRESS), o54=UP.packed)), NOW + 600))
    assert (ack.type, int.from_bytes(ack.options[51], "big")) == (MessageType.ACK, 3000)
    core.hold(replace(LEASE, expires=NOW + 5400), NOW + 1801)
    renewed = request(REQUEST, options=wants(), ciaddr=int(IPv4Address(ADDRESS)))
    assert int.from_bytes(answer(ask(core, renewed, NOW + 1801)).options[51], "big") == 3599
    assert core.hold(replace(LEASE, expires=FOREVER), NOW) == []
    assert answer(ask(core, renewed, NOW)).options[51] == b"\xff" * 4


def test_nothing_is_promised_beyond_our_own_lease(core: Handover) -> None:
    """A lease about to end is none; a REQUEST for it is left to time out, a DISCOVER waits."""
    core.hold(LEASE, NOW)
    late = NOW + 3599
    assert ask(core, request(REQUEST, options={50: packed(ADDRESS)}), late) == [ClientOrder.START]
    assert ask(core, request(DISCOVER), late) == [ClientOrder.START]


def test_a_lease_that_was_lost_is_refused(core: Handover) -> None:
    """The guest that still believes in it is told by NAK, to all, without an address (RFC 2131, table 3)."""
    core.hold(LEASE, NOW)
    core.lose()
    renewing = request(REQUEST, ciaddr=int(IPv4Address(ADDRESS)))
    (step,) = ask(core, renewing)
    assert isinstance(step, Give)
    assert step.reply.route is Route.BROADCAST
    nak = wire.decode(step.reply.data)
    assert (nak.type, nak.yiaddr, nak.options[54]) == (MessageType.NAK, 0, UP.packed)
    other = replace(LEASE, address=IPv4Interface("192.0.2.78/24"))
    core.hold(other, NOW)
    assert answer(ask(core, renewing)).type == MessageType.NAK
    assert answer(ask(core, request(DISCOVER))).yiaddr == int(IPv4Address("192.0.2.78"))


def test_before_the_first_lease_nobody_is_refused(core: Handover) -> None:
    """A guest that restarts with a lease of its own (INIT-REBOOT) waits until ours is known."""
    assert ask(core, request(REQUEST, options={50: packed(ADDRESS)})) == [ClientOrder.START]
    core.hold(LEASE, NOW)
    assert answer(ask(core, request(REQUEST, options={50: packed(ADDRESS)}))).type == MessageType.ACK
    assert ask(core, request(REQUEST, options={50: packed(ADDRESS), 54: packed("192.0.2.3")})) == []
    assert core.counters["drop_chose_another_server"] == 1


def test_decline_and_release_go_on_to_the_client(core: Handover) -> None:
    """Only of the address that it has; afterwards there is nothing to give, and a new DISCOVER starts again."""
    core.hold(LEASE, NOW)
    assert ask(core, request(MessageType.DECLINE, options={50: packed("192.0.2.9")})) == []
    assert ask(core, request(MessageType.DECLINE, options={50: packed(ADDRESS)})) == [ClientOrder.DECLINE]
    core.hold(LEASE, NOW)
    assert ask(core, request(MessageType.RELEASE, ciaddr=int(IPv4Address(ADDRESS)))) == [ClientOrder.RELEASE]
    assert ask(core, request(MessageType.RELEASE, ciaddr=int(IPv4Address(ADDRESS)))) == []
    assert ask(core, request(DISCOVER)) == [ClientOrder.START]


def test_another_guests_messages_and_rubbish_are_dropped(core: Handover) -> None:
    """The port's own MAC only; relays and replies from a guest are nothing."""
    core.hold(LEASE, NOW)
    assert ask(core, request(DISCOVER, 2)) == []
    assert ask(core, request(DISCOVER, giaddr=int(UP))) == []
    assert ask(core, request(DISCOVER)._replace(op=2)) == []
    assert core.receive(b"x" * 300, NOW) == []
    assert ask(core, request(None)) == []
    assert answer(ask(core, request(MessageType.INFORM, ciaddr=int(UP) + 9))).options.get(51) is None


def test_a_stored_lease_keeps_what_the_server_said() -> None:
    """After a restart the guest is told the same."""
    assert Lease.loads(LEASE.dumps()) == LEASE


def test_the_log_of_exchanges_is_bounded_by_port() -> None:
    """Sixteen entries a port; a port that floods pushes out nobody else's, ports beyond 256 the oldest."""
    driver = Driver()
    driver.bind(1, port="calm")
    for client in range(2, 60):
        driver.send(request(DISCOVER, client), port="evil")
    driver.server.receive(b"rubbish", Source("evil"), driver.now)
    log = [one.describe() for one in driver.server.exchanges.list()]
    assert [(one["request"], one["answer"]) for one in log if one["port"] == "calm"] == [
        ("DISCOVER", "OFFER"),
        ("REQUEST", "ACK"),
    ]
    evil = [one for one in log if one["port"] == "evil"]
    assert len(evil) == ENTRIES_MAX
    assert (evil[-1]["mac"], evil[-1]["answer"], evil[-1]["why"]) == (None, None, "malformed")
    assert log[0]["address"] == "10.5.0.10"
    for number in range(PORTS_MAX):
        driver.send(request(DISCOVER, 1), port=f"p{number}")
    assert not [one for one in driver.server.exchanges.list() if one.port in ("calm", "evil")]

"""rayos_net.dhcp.client: figure 5 of RFC 2131 against our own server core, in simulated time."""

import random
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from itertools import pairwise
from typing import Any

import pytest

from rayos_net.dhcp import message as wire
from rayos_net.dhcp.client import HISTORY_MAX, Client
from rayos_net.dhcp.client_action import Acquired, ClientConfig, Informed, Lost, Output, SendArp, Transmit
from rayos_net.dhcp.client_state import HAVE_ADDRESS, TRANSITIONS, ClientEvent, ClientState
from rayos_net.dhcp.config import Limits, SubnetConfig
from rayos_net.dhcp.conflict import QUICK
from rayos_net.dhcp.frame import Arp
from rayos_net.dhcp.lease import Lease, from_ack
from rayos_net.dhcp.message import Message, MessageType
from tests.unit.net.dhcp_driver import NOW, SERVER, Driver, mac, number, packed, subnet

ME = mac(1)
OTHER = b"\x02\0\0\0\0\x99"


class World:
    """A client and servers on one link, and the time."""

    def __init__(self, *servers: Driver, **config: Any) -> None:
        chance = random.Random(3)
        self.now = NOW
        self.servers = list(servers)
        self.client = Client(
            ClientConfig(ME, **{"times": QUICK, **config}),
            uniform=chance.uniform,
            random_xid=lambda: chance.getrandbits(32),
        )
        self.told: list[Output] = []
        self.sent: list[tuple[float, Message, Transmit]] = []
        self.arps: list[SendArp] = []
        self.taken: set[int] = set()  # addresses that another host answers for

    def state(self) -> ClientState:
        return self.client.state

    def start(self, stored: Lease | None = None) -> None:
        """Start the client."""
        self.do(self.client.start(self.now, stored=stored))

    def do(self, outputs: list[Output]) -> None:
        """Carry out what the client wants; what the servers answer is delivered at once."""
        for output in outputs:
            match output:
                case Transmit():
                    message = wire.decode(output.payload)
                    self.sent.append((self.now, message, output))
                    for server in list(self.servers):
                        server.now = self.now
                        server_ip = int(server.server.config.server)
                        if output.destination in (0xFFFFFFFF, server_ip):
                            self.deliver(server.send(message, unicast=output.destination == server_ip))
                case SendArp(address, is_probe):
                    self.arps.append(output)
                    if is_probe and address in self.taken:
                        self.do(self.client.heard(Arp(2, OTHER, address, ME, 0), self.now))
                case _:
                    self.told.append(output)

    def deliver(self, reply: Message | None) -> None:
        """Give the client a message."""
        if reply is not None:
            self.do(self.client.receive(reply.encode(1400), OTHER, self.now))

    def run(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, from deadline to deadline."""
        end = self.now + seconds
        for _ in range(10_000):
            if until():
                return
            deadline = self.client.deadline()
            if deadline is None or deadline > end:
                break
            self.now = max(self.now, deadline)
            self.do(self.client.handle_timer(self.now))
        else:
            raise AssertionError("the client does not come to rest")
        self.now = end

    def bind(self) -> Lease:
        """Run until there is a lease."""
        self.start()
        self.run(30, until=lambda: self.client.state is ClientState.BOUND)
        assert self.client.lease is not None
        return self.client.lease

    def kinds(self) -> list[str]:
        """Returns the kinds of the messages that were sent."""
        return [MessageType(message.type or 0).name for _, message, _ in self.sent]


def test_every_pair_of_state_and_event_is_decided() -> None:
    """Each state can be left and reached, and every move of figure 5 is there."""
    assert len(ClientState) == 9
    assert {state for state, _ in TRANSITIONS} == set(ClientState)
    assert set(TRANSITIONS.values()) == set(ClientState)
    for state in HAVE_ADDRESS:
        assert TRANSITIONS[state, ClientEvent.EXPIRE] is ClientState.INIT
        assert TRANSITIONS[state, ClientEvent.CONFLICT] is ClientState.DECLINED
        assert TRANSITIONS[state, ClientEvent.RELEASE] is ClientState.RELEASED
    for state in ClientState:
        for event in ClientEvent:
            assert TRANSITIONS.get((state, event)) in (None, *ClientState)


def test_a_lease_is_used_only_after_three_probes_and_then_announced() -> None:
    """DISCOVER, REQUEST, three probes, two announcements (RFC 5227, 2.1.1 and 2.3)."""
    world = World(Driver())
    lease = world.bind()
    world.run(3)
    assert world.kinds() == ["DISCOVER", "REQUEST"]
    assert [one.is_probe for one in world.arps] == [True] * 3 + [False] * 2
    assert lease.address == IPv4Interface("10.5.0.10/24")
    assert (lease.routers, lease.dns, lease.domain) == ((SERVER,), (SERVER,), "guest.rayos")
    assert world.told == [Acquired(lease)]


def test_the_lease_runs_from_when_the_request_was_sent() -> None:
    """Not from when the ACK came, nor from the end of probing (RFC 2131, 4.4.1)."""
    world = World(Driver())
    lease = world.bind()
    sent = world.sent[-1][0]
    assert (lease.renew_at, lease.rebind_at, lease.expires) == (sent + 1800, sent + 3150, sent + 3600)


def test_it_renews_at_half_time_by_unicast() -> None:
    """REQUEST to the server with ciaddr, without options 50 and 54 (RFC 2131, table 5)."""
    world = World(Driver())
    first = world.bind()
    world.run(1801)
    _, message, transmit = world.sent[-1]
    assert (message.ciaddr, transmit.destination) == (int(first.address.ip), int(SERVER))
    assert not {50, 54} & set(message.options)
    assert world.state() is ClientState.BOUND
    assert world.client.lease is not None
    assert world.client.lease.expires > first.expires


def test_a_dead_server_leads_to_rebinding_with_another() -> None:
    """T2: REQUEST to all; another server that knows the lease extends it, the address never changes."""
    dead, living = Driver(), Driver(subnet())
    world = World(dead)
    lease = world.bind()
    world.servers = []
    world.run(3151 + 1)
    assert world.state() is ClientState.REBINDING
    assert world.sent[-1][2].destination == 0xFFFFFFFF
    living.server.restore(dead.server.leases())
    world.servers = [living]
    world.run(400)
    assert world.state() is ClientState.BOUND
    assert [type(one) for one in world.told] == [Acquired, Acquired]
    assert world.client.lease is not None
    assert world.client.lease.address == lease.address


def test_an_expired_lease_is_given_up_at_once() -> None:
    """Without any server the address goes at expiry and DISCOVER begins (RFC 2131, 4.4.5)."""
    world = World(Driver())
    lease = world.bind()
    world.servers = []
    world.run(3601)
    assert world.told[1:] == [Lost(lease, "expired")]
    assert world.state() is ClientState.SELECTING
    renewals = [at for at, message, _ in world.sent if message.ciaddr]
    gaps = [later - earlier for earlier, later in pairwise(renewals)]
    assert sum(gap < 59.9 for gap in gaps) <= 1  # from the last renewal to T2
    assert len(renewals) >= 4


def test_a_conflict_is_declined_and_another_address_follows() -> None:
    """DECLINE is broadcast with ciaddr 0 and options 50 and 54; after 10 seconds it starts again."""
    world = World(Driver())
    world.taken.add(number("10.5.0.10"))
    world.start()
    world.run(5)
    assert world.state() is ClientState.DECLINED
    _, message, transmit = world.sent[-1]
    assert (message.type, message.ciaddr, transmit.destination) == (MessageType.DECLINE, 0, 0xFFFFFFFF)
    assert (message.options[50], message.options[54]) == (packed("10.5.0.10"), SERVER.packed)
    assert world.told == []
    world.run(30, until=lambda: world.state() is ClientState.BOUND)
    assert world.client.lease is not None
    assert world.client.lease.address.ip == IPv4Address("10.5.0.11")


def test_ten_conflicts_slow_it_down() -> None:
    """After MAX_CONFLICTS at most one attempt a minute (RFC 5227, 2.1.1)."""
    world = World(Driver(subnet(quarantine_seconds=0.001)))
    world.taken.update(range(number("10.5.0.0"), number("10.5.0.255")))
    world.start()
    world.run(1200)
    declines = [at for at, message, _ in world.sent if message.type == MessageType.DECLINE]
    assert len(declines) > 12
    assert min(later - earlier for earlier, later in pairwise(declines[9:])) >= 60


def test_an_address_is_defended_once_and_then_given_up() -> None:
    """One announcement; a second conflict within ten seconds means that it is lost (RFC 5227, 2.4, b)."""
    world = World(Driver())
    lease = world.bind()
    world.run(5)
    world.arps.clear()
    intruder = Arp(1, OTHER, int(lease.address.ip), bytes(6), int(lease.address.ip))
    world.do(world.client.heard(intruder, world.now))
    assert [one.is_probe for one in world.arps] == [False]
    assert world.state() is ClientState.BOUND
    world.run(5)
    world.do(world.client.heard(intruder, world.now))
    assert world.state() is ClientState.DECLINED
    assert world.told[-1] == Lost(lease, "another host has the address")


def test_our_own_arp_is_no_conflict() -> None:
    """A bridge may show us what we sent."""
    world = World(Driver())
    lease = world.bind()
    world.do(world.client.heard(Arp(1, ME, int(lease.address.ip), bytes(6), 1), world.now))
    assert world.state() is ClientState.BOUND


def test_arp_for_its_address_is_answered_only_where_nobody_else_does() -> None:
    """A client that speaks for a guest leaves the answer to the guest; one without a stack behind it answers."""
    for is_answering in (True, False):
        world = World(Driver(), is_answering_arp=is_answering)
        own = int(world.bind().address.ip)
        world.run(5)
        world.arps.clear()
        for sender in (int(SERVER), 0):
            world.do(world.client.heard(Arp(1, OTHER, sender, bytes(6), own), world.now))
        world.do(world.client.heard(Arp(1, OTHER, int(SERVER), bytes(6), own + 1), world.now))
        assert len([one for one in world.arps if one.answer_to]) == (2 if is_answering else 0)


def test_discover_is_repeated_with_doubling_waits() -> None:
    """4, 8, 16, 32 and 64 seconds, each give or take one (RFC 2131, 4.1); then ERROR, and again after a
    pause.
    """
    world = World(attempts=6)
    world.start()
    world.run(200)
    assert world.state() is ClientState.ERROR
    times = [at for at, _, _ in world.sent]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert [round(gap / wait) for gap, wait in zip(gaps, (4, 8, 16, 32, 64), strict=True)] == [1] * 5
    assert all(abs(gap - wait) <= 1 for gap, wait in zip(gaps, (4, 8, 16, 32, 64), strict=True))


def test_without_a_server_the_static_address_is_used_until_one_comes() -> None:
    """ERROR with a fallback: used, announced, and replaced by the first real lease."""
    world = World(attempts=2, fallback=IPv4Interface("10.5.0.250/24"), error_pause=30.0)
    world.start()
    world.run(20)
    assert world.state() is ClientState.ERROR
    (acquired,) = world.told
    assert isinstance(acquired, Acquired)
    assert acquired.lease.is_static
    world.servers = [Driver()]
    world.run(60, until=lambda: world.state() is ClientState.BOUND)
    assert world.client.lease is not None
    assert not world.client.lease.is_static


def test_the_static_address_is_given_up_when_another_host_has_it() -> None:
    """No DECLINE: no server gave it."""
    world = World(attempts=1, fallback=IPv4Interface("10.5.0.250/24"))
    world.start()
    world.run(10)
    intruder = Arp(1, OTHER, number("10.5.0.250"), bytes(6), 1)
    world.do(world.client.heard(intruder, world.now))
    world.do(world.client.heard(intruder, world.now))
    assert isinstance(world.told[-1], Lost)
    assert "DECLINE" not in world.kinds()


def test_the_longest_offer_is_chosen_and_the_next_one_follows_a_nak() -> None:
    """Several servers: the other offer is used without a new DISCOVER when the first server refuses."""
    short = Driver(subnet(lease_seconds=600))
    long = Driver(
        SubnetConfig(
            subnet().network,
            IPv4Address("10.5.0.2"),
            lease_seconds=7200,
            probe_seconds=0,
            limits=Limits.none(),
        )
    )
    world = World(short, long)
    world.start()
    assert world.state() is ClientState.SELECTING
    for lease in long.server.leases():  # it changes its mind: the address is another's now
        long.server.pools[0].put(lease._replace(client=b"other", hardware=OTHER))
    world.run(10, until=lambda: world.state() is ClientState.BOUND)
    assert world.kinds().count("DISCOVER") == 1
    servers = [message.options[54] for _, message, _ in world.sent if message.type == MessageType.REQUEST]
    assert servers == [packed("10.5.0.2"), SERVER.packed]
    assert world.client.lease is not None
    assert world.client.lease.server == SERVER


def test_a_stored_lease_is_asked_for_without_discover() -> None:
    """INIT-REBOOT: one REQUEST with option 50 and no 54; the flag is set meanwhile."""
    driver = Driver()
    stored = Lease.loads(World(driver).bind().dumps())
    world = World(driver)
    world.start(stored)
    assert world.client.is_rebooting
    world.run(5, until=lambda: world.state() is ClientState.BOUND)
    assert world.kinds() == ["REQUEST"]
    assert world.sent[0][1].options[50] == packed("10.5.0.10")
    assert 54 not in world.sent[0][1].options
    assert not world.client.is_rebooting


def test_a_stored_lease_of_another_network_is_refused_and_replaced() -> None:
    """NAK in REBOOTING leads to DISCOVER at once."""
    stored = World(Driver()).bind()
    moved = replace(stored, address=IPv4Interface("192.168.9.9/24"))
    world = World(Driver())
    world.start(moved)
    world.run(5, until=lambda: world.state() is ClientState.BOUND)
    assert world.kinds() == ["REQUEST", "DISCOVER", "REQUEST"]


def test_naks_one_after_another_do_not_make_it_flood() -> None:
    """A server that always refuses gets fewer and fewer requests."""

    class Refusing(Driver):
        def send(self, message: Message, *, port: str = "", unicast: bool = False) -> Message | None:
            reply = super().send(message, port=port, unicast=unicast)
            if message.type == MessageType.REQUEST and reply is not None:
                return reply._replace(yiaddr=0, options={53: b"\6", 54: SERVER.packed})
            return reply

    world = World(Refusing())
    world.start()
    world.run(300)
    assert len(world.sent) < 40


@pytest.mark.parametrize(
    "change",
    [
        {"xid": 1},
        {"op": 1},
        {"chaddr": OTHER},
        {"options": {61: b"\xffother"}},
        {"options": {53: b"\7"}},
        {"options": {54: b""}},
    ],
)
def test_a_neighbours_reply_is_not_ours(change: dict[str, Any]) -> None:
    """Transaction, hardware address, client identifier and direction must fit (hostile neighbours on the
    link).
    """
    world = World()
    world.start()
    xid = world.sent[-1][1].xid
    options = {53: b"\2", 54: SERVER.packed, 51: (3600).to_bytes(4), 1: packed("255.255.255.0")}
    offer = Message(2, 0, xid, 0, 0, 0, number("10.5.0.66"), 0, 0, ME, b"", b"", options)
    world.deliver(offer._replace(**{**change, "options": {**options, **change.get("options", {})}}))
    world.run(1)
    assert world.kinds() == ["DISCOVER"]
    world.deliver(offer)
    world.run(1)
    assert world.kinds() == ["DISCOVER", "REQUEST"]


def test_an_ack_of_a_server_that_was_not_chosen_does_not_count() -> None:
    """Nor one for another address than the one that was asked for."""
    driver = Driver()
    world = World()
    world.start()
    world.deliver(driver.send(world.sent[0][1]))
    world.run(1)
    asked = world.sent[-1][1]
    ack = driver.send(asked)
    assert ack is not None
    world.deliver(ack._replace(options={**ack.options, 54: packed("10.5.0.9")}))
    world.deliver(ack._replace(yiaddr=number("10.5.0.99")))
    assert world.arps == []
    world.deliver(ack)
    world.run(1)
    assert world.state() is ClientState.BOUND


def test_release_gives_the_address_back_and_rests() -> None:
    """RELEASE by unicast with options 54 and 61 only; nothing more is sent until the next start."""
    driver = Driver()
    world = World(driver)
    lease = world.bind()
    world.do(world.client.release(world.now))
    _, message, transmit = world.sent[-1]
    assert (message.type, message.ciaddr, transmit.destination) == (
        MessageType.RELEASE,
        int(lease.address.ip),
        int(SERVER),
    )
    assert set(message.options) == {53, 54, 61}
    assert driver.kinds()[-1] == "released"
    sent = len(world.sent)
    world.run(10_000)
    assert len(world.sent) == sent
    world.start()
    world.run(5)
    assert world.state() is ClientState.BOUND


def test_inform_gets_parameters_and_touches_no_lease() -> None:
    """For an address that was set by hand."""
    world = World(Driver())
    world.do(world.client.inform(IPv4Address("10.5.0.200"), world.now))
    (told,) = world.told
    assert isinstance(told, Informed)
    assert told.options[6] == SERVER.packed
    assert world.state() is ClientState.INIT


def test_the_history_keeps_sixteen_transactions() -> None:
    """Enough to see what went wrong, in bounded memory."""
    world = World(attempts=1, error_pause=1.0, retransmit=0.1)
    world.start()
    world.run(100)
    assert len(world.client.history) == HISTORY_MAX
    assert {one.outcome for one in world.client.history} <= {"unanswered", "open"}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, (1800, 3150)),
        ({58: 100, 59: 200}, (100, 200)),
        ({58: 300, 59: 200}, (1800, 3150)),
        ({58: 100, 59: 9999}, (1800, 3150)),
        ({58: 0, 59: 200}, (1800, 3150)),
    ],
)
def test_times_of_the_server_count_only_in_order(times: dict[int, int], expected: tuple[int, int]) -> None:
    """T1 < T2 < lease, else the usual halves and eighths (RFC 2131, 4.4.5)."""
    options = {code: value.to_bytes(4) for code, value in times.items()}
    options |= {53: b"\5", 54: SERVER.packed, 51: (3600).to_bytes(4), 1: packed("255.255.255.0")}
    lease = from_ack(Message(2, 0, 1, 0, 0, 0, number("10.5.0.10"), 0, 0, ME, b"", b"", options), 1000.0)
    assert lease is not None
    assert (lease.renew_at - 1000, lease.rebind_at - 1000) == expected


def test_a_lease_without_end_is_never_renewed() -> None:
    """0xffffffff (RFC 2131, 3.3)."""
    options = {53: b"\5", 54: SERVER.packed, 51: b"\xff" * 4, 1: packed("255.255.0.255")}
    lease = from_ack(Message(2, 0, 1, 0, 0, 0, number("10.5.0.10"), 0, 0, ME, b"", b"", options), 0.0)
    assert lease is not None
    assert lease.expires == float("inf")
    assert lease.address.network.prefixlen == 32  # the mask has a hole
    assert Lease.loads(lease.dumps()) == lease
    with pytest.raises(ValueError, match="stored lease"):
        Lease.loads("{}")


def test_any_bytes_are_ignored() -> None:
    """No bytes from the network raise anything, in any state."""
    chance = random.Random(9)
    world = World(Driver())
    world.bind()
    template = world.sent[0][2].payload
    for _ in range(3000):
        data = bytearray(template)
        for _ in range(chance.randrange(6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        data[0] = 2
        data[4:8] = world.client._xid.to_bytes(4)
        world.do(world.client.receive(bytes(data), OTHER, world.now))

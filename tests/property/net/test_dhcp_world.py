"""Clients and a server on a link that loses datagrams, with crashes on both sides: nobody ever shares an
address.
"""

import random
from ipaddress import IPv4Address

from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_net.dhcp import message as wire
from rayos_net.dhcp.answer import Reply
from rayos_net.dhcp.binding import Binding
from rayos_net.dhcp.client import Client
from rayos_net.dhcp.client_action import Acquired, ClientConfig, Lost, Output, SendArp, Transmit
from rayos_net.dhcp.client_state import HAVE_ADDRESS, ClientState
from rayos_net.dhcp.conflict import QUICK
from rayos_net.dhcp.frame import Arp
from rayos_net.dhcp.lease import Lease
from rayos_net.dhcp.server import Server
from rayos_net.dhcp.server_action import Action, Commit, Probe, Send, Source
from tests.unit.net.dhcp_driver import NOW, mac, subnet

CLIENTS = 6
STEPS = 400
SERVER_MAC = b"\x52\x59\xff\xff\xff\xff"


class World:
    """One link. What a client or the server has on its disk survives its crash, nothing else."""

    def __init__(self, seed: int, loss: float, *, is_detecting: bool) -> None:
        self.chance = random.Random(seed)
        self.loss = loss
        self.is_detecting = is_detecting  # by ARP; without it all depends on the server
        self.now = NOW
        last = IPv4Address("10.5.0.17")  # eight addresses for six clients: they are reused
        self.config = subnet(
            pool=((IPv4Address("10.5.0.10"), last),),
            lease_seconds=120,
            probe_seconds=0.1 if is_detecting else 0.0,
            quarantine_seconds=60.0,
        )
        self.server_disk: dict[int, Binding] = {}
        self.server = Server(self.config)
        self.client_disk: dict[int, Lease] = {}
        self.clients = [self.new_client(number) for number in range(CLIENTS)]
        self.acquired = 0

    def new_client(self, number: int) -> Client:
        """A client that has just been switched on."""
        config = ClientConfig(
            mac(number),
            times=QUICK,
            renew_minimum=5.0,
            error_pause=10.0,
            is_probing=self.is_detecting,
            is_answering_arp=self.is_detecting,
        )
        chance = self.chance
        return Client(config, uniform=chance.uniform, random_xid=lambda: chance.getrandbits(32))

    def crash_server(self) -> None:
        """kill -9 and a new one."""
        self.server = Server(self.config)
        self.server.restore(list(self.server_disk.values()))

    def crash_client(self, number: int) -> None:
        """The guest loses power and comes back, with or without its lease file."""
        self.clients[number] = client = self.new_client(number)
        stored = self.client_disk.get(number) if self.chance.random() < 0.7 else None
        self.client_does(number, client.start(self.now, stored=stored))

    def client_does(self, number: int, outputs: list[Output]) -> None:
        """Carry out what a client wants."""
        for output in outputs:
            match output:
                case Transmit(payload):
                    if self.chance.random() >= self.loss:
                        source = Source(f"tap{number}", output.destination == int(self.config.server))
                        self.server_does(self.server.receive(payload, source, self.now))
                case SendArp(address, is_probe, answered):
                    sender = 0 if is_probe else address
                    asked = address if answered is None else answered.sender
                    self.arp(number, Arp(1 if answered is None else 2, mac(number), sender, bytes(6), asked))
                case Acquired(lease):
                    self.client_disk[number] = lease
                    self.acquired += 1
                case Lost():
                    self.client_disk.pop(number, None)
                case _:
                    pass
        self.check()

    def arp(self, number: int, arp: Arp) -> None:
        """Everybody else hears ARP; it is not lost, as on a bridge of one host."""
        if not self.is_detecting:
            return
        for other, client in enumerate(self.clients):
            if other != number:
                self.client_does(other, client.heard(arp, self.now))
        if arp.sender:
            self.server_does(self.server.conflict(arp.sender, arp.sender_hardware, self.now))

    def server_does(self, actions: list[Action]) -> None:
        """Carry out what the server wants; sometimes it dies in the middle."""
        for action in actions:
            if self.chance.random() < 0.002:
                self.crash_server()
                return
            match action:
                case Send(reply):
                    self.deliver(reply)
                case Commit(binding, reply, _):
                    self.server_disk[binding.ip] = binding
                    if self.chance.random() < 0.01:  # stored, but the ACK is not sent any more
                        self.crash_server()
                        return
                    if reply is not None:
                        self.deliver(reply)
                case Probe(ip):
                    self.arp(-1, Arp(1, SERVER_MAC, 0, bytes(6), ip))

    def deliver(self, reply: Reply) -> None:
        """A reply reaches the client that it is for, or is lost."""
        if self.chance.random() < self.loss:
            return
        number = int.from_bytes(wire.decode(reply.data).chaddr[2:], "big")
        self.client_does(number, self.clients[number].receive(reply.data, SERVER_MAC, self.now))

    def check(self) -> None:
        """The promise."""
        used = [
            one.lease.address for one in self.clients if one.lease is not None and one.state in HAVE_ADDRESS
        ]
        assert len(set(used)) == len(used), f"an address is used twice at {self.now}"

    def step(self) -> None:
        """The next thing that happens."""
        dice = self.chance.random()
        number = self.chance.randrange(CLIENTS)
        if dice < 0.08:
            self.crash_server()
        elif dice < 0.12:
            self.crash_client(number)
        elif dice < 0.14:
            self.client_does(number, self.clients[number].release(self.now))
        elif dice < 0.2 and self.clients[number].state in (ClientState.RELEASED, ClientState.INIT):
            self.client_does(number, self.clients[number].start(self.now))
        deadlines = [*(one.deadline() for one in self.clients), self.server.deadline()]
        self.now = max(self.now, min((one for one in deadlines if one is not None), default=self.now + 1.0))
        # An expired lease is given up before anybody else acts at that time.
        for one, client in enumerate(self.clients):
            self.client_does(one, client.handle_timer(self.now))
        self.server_does(self.server.handle_timer(self.now))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.4]), st.booleans())
def test_no_address_is_ever_used_by_two_clients(seed: int, loss: float, is_detecting: bool) -> None:
    """Whatever is lost and whoever crashes; and clients do get their addresses."""
    world = World(seed, loss, is_detecting=is_detecting)
    for number in range(CLIENTS):
        world.client_does(number, world.clients[number].start(world.now))
    for _ in range(STEPS):
        world.step()
    assert world.acquired >= CLIENTS

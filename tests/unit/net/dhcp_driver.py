"""A client's side in a few lines, to drive the DHCP server core without I/O."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from rayos_net.dhcp import message as wire
from rayos_net.dhcp.answer import Reply
from rayos_net.dhcp.binding import LeaseEvent
from rayos_net.dhcp.config import Limits, SubnetConfig
from rayos_net.dhcp.message import Message, MessageType
from rayos_net.dhcp.server import Server
from rayos_net.dhcp.server_action import Action, Commit, Probe, Send, Source, Tell

NETWORK = IPv4Network("10.5.0.0/24")
SERVER = IPv4Address("10.5.0.1")
NOW = 1_700_000_000.0


def packed(address: str) -> bytes:
    """An address as four bytes."""
    return IPv4Address(address).packed


def number(address: str) -> int:
    """An address as an integer."""
    return int(IPv4Address(address))


def mac(client: int) -> bytes:
    """The hardware address of client number `client`."""
    return b"\x52\x59" + client.to_bytes(4, "big")


def subnet(**changes: Any) -> SubnetConfig:
    """A /24 without probing, with a router, DNS and domain."""
    usual: dict[str, Any] = {
        "pool": ((IPv4Address("10.5.0.10"), IPv4Address("10.5.0.99")),),
        "probe_seconds": 0.0,
        "router": SERVER,
        "dns": (SERVER,),
        "domain": "guest.rayos",
        "limits": Limits.none(),
    }
    return SubnetConfig(NETWORK, SERVER, **{**usual, **changes})


def request(
    kind: int | None, client: int = 1, *, options: dict[int, bytes] | None = None, **header: Any
) -> Message:
    """A message from a client."""
    blank = Message(wire.BOOT_REQUEST, 0, 0x1234, 0, 0, 0, 0, 0, 0, mac(client), b"", b"", {})
    typed = {} if kind is None else {53: bytes((kind,))}
    return blank._replace(options={**typed, **(options or {})}, **header)


class Driver:
    """A server and the replies it gives; what it wants stored is stored at once."""

    def __init__(self, config: SubnetConfig | None = None, *, remote: tuple[SubnetConfig, ...] = ()) -> None:
        self.server = Server(config or subnet(), remote=remote)
        self.events: list[LeaseEvent] = []
        self.probes: list[int] = []
        self.now = NOW
        self.reply: Reply | None = None

    def send(self, message: Message, *, port: str = "", unicast: bool = False) -> Message | None:
        """Give the server a message; return its reply."""
        if self.server.admit(port, self.now):
            return None
        return self.perform(self.server.receive(message.encode(1400), Source(port, unicast), self.now))

    def wait(self, seconds: float) -> Message | None:
        """Let time pass; return a reply that was due."""
        self.now += seconds
        return self.perform(self.server.handle_timer(self.now))

    def perform(self, actions: Sequence[Action]) -> Message | None:
        """Do what the server wants; return the last reply."""
        self.reply = None
        for action in actions:
            match action:
                case Send(reply):
                    self.reply = reply
                case Commit(_, reply, event):
                    self.reply = reply or self.reply
                    if event is not None:
                        self.events.append(event)
                case Tell(event):
                    self.events.append(event)
                case Probe(ip):
                    self.probes.append(ip)
        return wire.decode(self.reply.data) if self.reply is not None else None

    def kinds(self) -> list[str]:
        """The kinds of the events so far."""
        return [event.kind.value for event in self.events]

    def bind(self, client: int = 1, *, port: str = "", options: dict[int, bytes] | None = None) -> Message:
        """A whole DISCOVER, OFFER, REQUEST, ACK; return the ACK."""
        more = options or {}
        offer = self.send(request(MessageType.DISCOVER, client, options=more), port=port)
        assert offer is not None, self.server.counters
        chosen = {**more, 50: offer.yiaddr.to_bytes(4, "big"), 54: SERVER.packed}
        ack = self.send(request(MessageType.REQUEST, client, options=chosen), port=port)
        assert ack is not None, self.server.counters
        assert ack.type == MessageType.ACK
        return ack

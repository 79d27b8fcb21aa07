"""One guest's DHCP answered with the lease that our client holds for it elsewhere (RFC 2131, 4.3), without I/O.

Theory of operation. The client asks the upstream server in the guest's name (its hardware address). `hold` is
told each lease, `lose` when there is none any more. The guest's requests are answered with exactly that lease:
the address, the options as they came, the upstream server's identifier, and the time that is *left*; a renewal
gets what the client's own renewal has won meanwhile. While there is no lease a DISCOVER waits (the newest), a
REQUEST for a lease that was lost is refused, any other is left to time out. A guest's DECLINE and RELEASE go on
to the client, and a DISCOVER after a RELEASE starts it again.

Invariant: the guest's lease never outlasts ours; only this guest's messages count; nothing that it sends raises.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from rayos_net.dhcp import message as wire
from rayos_net.dhcp import option
from rayos_net.dhcp.answer import Answers, Reply
from rayos_net.dhcp.lease import FOREVER, Lease
from rayos_net.dhcp.message import BadMessage, Message, MessageType
from rayos_net.dhcp.option import INFINITE, Code

#: What the client asks for, that the guest may: those of a Linux client, and of network boot.
PARAMETERS: Final = bytes((1, 121, 3, 6, 12, 15, 26, 28, 33, 42, 51, 54, 58, 59, 66, 67, 108, 119, 150))
LEFT_MIN: Final = 2.0  # seconds; less is no lease
# Ours to say, or about the exchange with our client.
_OWN: Final = frozenset(
    (0, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, Code.RAPID_COMMIT, Code.FQDN, Code.RELAY_AGENT, 255)
)


class ClientOrder(Enum):
    """The order that the client carries out for the guest."""

    START = "start"
    DECLINE = "decline"
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class Give:
    """Send this to the guest."""

    reply: Reply
    kind: MessageType


Step = Give | ClientOrder


class Handover:
    """The server's side for the guest with the address `hardware`."""

    def __init__(self, hardware: bytes) -> None:
        self.hardware = hardware
        self.counters: dict[str, int] = {}
        self.lease: Lease | None = None
        self.server = 0  # the upstream server's address, that of the last lease when there is none
        self._answers = Answers(0, {})
        self._waiting: Message | None = None  # a DISCOVER
        self._lost: int | None = None  # the address that the guest may still believe in

    def hold(self, lease: Lease, now: float) -> list[Step]:
        """The client has this lease from now on; a DISCOVER that waits is answered."""
        if self.lease is not None and self.lease.address.ip != lease.address.ip:
            self._lost = int(self.lease.address.ip)
        self.lease = lease
        values = {code: value for code, value in lease.options.items() if code not in _OWN}
        values.setdefault(Code.SUBNET_MASK, lease.address.netmask.packed)
        self.server = int(lease.server)
        self._answers = Answers(self.server, values)
        waiting, self._waiting = self._waiting, None
        return [] if waiting is None else self._offer(waiting, now)

    def lose(self) -> None:
        """The client has no lease any more."""
        if self.lease is not None:
            self._lost = int(self.lease.address.ip)
        self.lease = None

    def receive(self, data: bytes, now: float) -> list[Step]:
        """Handles a datagram to port 67 that came from the guest's port."""
        try:
            request = wire.decode(data)
        except BadMessage:
            return self._drop("malformed")
        if request.op != wire.BOOT_REQUEST or request.giaddr:
            return self._drop("not_a_request")
        if request.chaddr != self.hardware:
            return self._drop("foreign_hardware")
        match request.type:
            case MessageType.DISCOVER:
                return self._discover(request, now)
            case MessageType.REQUEST:
                return self._request(request, now)
            case MessageType.DECLINE if self._is_ours(option.u32(request.options.get(50))):
                self.lose()
                return self._order(ClientOrder.DECLINE)
            case MessageType.RELEASE if self._is_ours(request.ciaddr):
                self.lose()
                self._lost = None  # it knows
                return self._order(ClientOrder.RELEASE)
            case MessageType.INFORM if self.lease is not None:
                return self._give(
                    self._answers.lease(request, MessageType.ACK, request.ciaddr, None), MessageType.ACK
                )
        return self._drop("ignored")

    def _discover(self, request: Message, now: float) -> list[Step]:
        if self._left(now) is not None:
            return self._offer(request, now)
        self._waiting = request
        self._count("discover_waits")
        return [ClientOrder.START]

    def _offer(self, request: Message, now: float) -> list[Step]:
        return self._lease(request, MessageType.OFFER, now)

    def _request(self, request: Message, now: float) -> list[Step]:
        chosen = option.u32(request.options.get(54))
        address = request.ciaddr or option.u32(request.options.get(50))
        if self._left(now) is None or self.lease is None:
            if address is not None and address == self._lost:
                return self._nak(request, "the lease was lost upstream")
            self._count("request_waits")
            return [ClientOrder.START]
        if chosen is not None and chosen != self.server:
            return self._drop("chose_another_server")
        if not self._is_ours(address):
            return self._nak(request, "another address is leased to this client")
        self._lost = None
        return self._lease(request, MessageType.ACK, now)

    def _lease(self, request: Message, kind: MessageType, now: float) -> list[Step]:
        left = self._left(now)
        if left is None or self.lease is None:
            return self._drop("no_lease")
        reply = self._answers.lease(request, kind, int(self.lease.address.ip), left)
        return self._give(reply, kind)

    def _nak(self, request: Message, reason: str) -> list[Step]:
        return self._give(self._answers.nak(request, reason), MessageType.NAK)

    def _left(self, now: float) -> int | None:
        # Whole seconds, rounded down: the guest's lease ends before ours.
        if self.lease is None or self.lease.expires - now < LEFT_MIN:
            return None
        return INFINITE if self.lease.expires == FOREVER else int(self.lease.expires - now)

    def _is_ours(self, address: int | None) -> bool:
        return self.lease is not None and address == int(self.lease.address.ip)

    def _give(self, reply: Reply, kind: MessageType) -> list[Step]:
        self._count(kind.name.lower())
        return [Give(reply, kind)]

    def _order(self, order: ClientOrder) -> list[Step]:
        self._count(order.value)
        return [order]

    def _count(self, what: str) -> None:
        self.counters[what] = self.counters.get(what, 0) + 1

    def _drop(self, why: str) -> list[Step]:
        self._count("drop_" + why)
        return []

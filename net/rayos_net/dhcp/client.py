"""The DHCP client as a state machine without I/O (RFC 2131, 4.4 and figure 5).

Theory of operation. `start` begins; `receive`, `heard` (ARP) and `handle_timer` move it on; each returns
what to do: send a datagram, send ARP, use a lease, stop using it. The moves between states are the table
TRANSITIONS and nothing else.

* SELECTING collects OFFERs for a moment, then asks for the best; the others are kept, so that a refusal or
silence falls back to the
  next one without a new DISCOVER. REQUESTING ends with an ACK *and* a finished conflict detection (RFC
  5227); a conflict is DECLINEd.
* INIT-REBOOT and REBOOTING of figure 5 are REQUESTING with `is_rebooting`: a stored lease is asked for
without DISCOVER. * T1 leads to RENEWING (to the server), T2 to REBINDING (to all), expiry to INIT; the
address is given up at once. * When no server answers, ERROR: the static fallback is used, if there is one,
and DISCOVER goes on.

Invariant: only a reply with our transaction, hardware address and (if echoed) client identifier counts, and
of a chosen server only; a lease runs from the time when its REQUEST was sent; after a NAK or DECLINE there
is a pause, so that a hostile server can't make us flood. `now` is in seconds on a clock that counts
suspended time (CLOCK_BOOTTIME) and never goes back.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from rayos_net.dhcp import lease as leases
from rayos_net.dhcp import message as wire
from rayos_net.dhcp import option
from rayos_net.dhcp.client_action import (
    Acquired,
    ClientConfig,
    Informed,
    Lost,
    Output,
    SendArp,
    Transaction,
    Transmit,
)
from rayos_net.dhcp.client_state import HAVE_ADDRESS, TRANSITIONS, ClientEvent, ClientState
from rayos_net.dhcp.conflict import Detector, Phase, Verdict
from rayos_net.dhcp.frame import BROADCAST_MAC, Arp
from rayos_net.dhcp.lease import FOREVER, Lease
from rayos_net.dhcp.message import BROADCAST_FLAG, BadMessage, Message, MessageType
from rayos_net.dhcp.option import Code

HISTORY_MAX: Final = 16
BROADCAST: Final = 0xFFFFFFFF
OFFERS_MAX: Final = 8
RETRANSMIT_MAX: Final = 64.0  # seconds (RFC 2131, 4.1)
REQUEST_ATTEMPTS: Final = 4  # then the next offer, or a new DISCOVER
REBOOT_ATTEMPTS: Final = 2  # then DISCOVER: a server that does not know us is silent (RFC 2131, 4.3.2)
DECLINE_WAIT: Final = 10.0  # seconds (RFC 2131, 3.1, 5)
OFFER_LIFE: Final = 30.0  # seconds for which an offer not chosen is kept


class _Offer(NamedTuple):
    message: Message
    server: int
    at: float


class Client:
    """One client. `uniform` gives a random float between two bounds, `random_xid` a random 32-bit number."""

    def __init__(
        self,
        config: ClientConfig,
        *,
        uniform: Callable[[float, float], float],
        random_xid: Callable[[], int],
    ) -> None:
        self.config = config
        self.state = ClientState.INIT
        self.is_rebooting = False
        self.lease: Lease | None = None  # in use
        self.history: deque[Transaction] = deque(maxlen=HISTORY_MAX)
        self.conflicts = 0
        self._uniform = uniform
        self._random_xid = random_xid
        self._client_id = config.client_id or b"\x01" + config.hardware
        self._detector = Detector(config.hardware, uniform, config.times)
        self._out: list[Output] = []
        self._offers: list[_Offer] = []
        self._asked: tuple[int, int] = (0, 0)  # address and server of the REQUEST (server 0: any)
        self._candidate: Lease | None = None  # acknowledged, being probed
        self._server_hardware = BROADCAST_MAC
        self._xid = 0
        self._began = 0.0
        self._sent_at = 0.0
        self._send_due: float | None = None
        self._choose_due: float | None = None
        self._resume_due: float | None = None
        self._refusals = 0
        self._inform: tuple[int, int] | None = None  # transaction and address of an open INFORM

    # What the caller tells.

    def start(self, now: float, *, stored: Lease | None = None) -> list[Output]:
        """Begin. With a stored lease that still runs, ask for that one (INIT-REBOOT). Starting twice does
        nothing.
        """
        if self.state is not ClientState.INIT or self._resume_due is not None:
            if self.state not in (ClientState.RELEASED, ClientState.ERROR):
                return []
            self._move(ClientEvent.START)
        self._began = now
        if stored is not None and stored.expires > now:
            self._move(ClientEvent.REBOOT)
            self.is_rebooting = True
            self._request(int(stored.address.ip), 0, now)
        else:
            self._resume_due = now + self._uniform(0.0, self.config.initial_delay)
        return self._take(now)

    def release(self, now: float) -> list[Output]:
        """Give the lease back (RFC 2131, 4.4.6)."""
        if self.state in HAVE_ADDRESS and self.lease is not None:
            lease = self.lease
            self._begin(MessageType.RELEASE, now).outcome = "sent"
            self._transmit(MessageType.RELEASE, now, ciaddr=int(lease.address.ip), server=int(lease.server))
            self._lose("released")
            self._move(ClientEvent.RELEASE)
            self._rest(None)
        return self._take(now)

    def renew(self, now: float) -> list[Output]:
        """Renew now rather than at T1."""
        if self.state is ClientState.BOUND and self.lease is not None:
            self.lease = replace(self.lease, renew_at=now)
        return self._take(now)

    def decline(self, now: float) -> list[Output]:
        """Who uses the address found that another host has it: as if we had found it ourselves."""
        if self.state in HAVE_ADDRESS:
            self._conflict(now)
        return self._take(now)

    def inform(self, address: IPv4Address, now: float) -> list[Output]:
        """Ask for parameters for an address that we have otherwise; `Informed` is the answer (RFC 2131,
        4.4.3).
        """
        xid = self._random_xid()
        self._inform = (xid, int(address))
        self.history.append(Transaction(xid, MessageType.INFORM, now, 1))
        message = self._message(MessageType.INFORM, now, xid=xid, ciaddr=int(address))
        self._out.append(Transmit(message.encode(), int(address), BROADCAST, BROADCAST_MAC))
        return self._take(now)

    def receive(self, payload: bytes, hardware: bytes, now: float) -> list[Output]:
        """A datagram to port 68 from the frame's sender `hardware`. Never raises on account of its content."""
        try:
            reply = wire.decode(payload)
        except BadMessage:
            return []
        echoed = reply.options.get(61)
        if reply.op != wire.BOOT_REPLY or reply.chaddr != self.config.hardware:
            return []
        if echoed is not None and echoed != self._client_id:
            return []  # another client's with the same hardware address (RFC 6842, 3)
        if self._inform is not None and reply.xid == self._inform[0] and reply.type == MessageType.ACK:
            self._inform = None
            self._close("answered", xid=reply.xid)
            self._out.append(Informed(reply.options))
        elif reply.xid == self._xid:
            server = option.u32(reply.options.get(54)) or 0
            match reply.type:
                case MessageType.OFFER if self.state is ClientState.SELECTING:
                    self._offer(reply, server, now)
                case MessageType.ACK:
                    self._ack(reply, server, hardware, now)
                case MessageType.NAK:
                    self._nak(server, now)
        return self._take(now)

    def heard(self, arp: Arp, now: float) -> list[Output]:
        """An ARP packet on the link."""
        self._detected(self._detector.heard(arp, now), now)
        lease = self.lease
        if self.config.is_answering_arp and lease is not None and arp.operation == 1:
            own = int(lease.address.ip)
            if arp.target == own and arp.sender != own and arp.sender_hardware != self.config.hardware:
                self._out.append(SendArp(own, is_probe=False, answer_to=arp))
        return self._take(now)

    def watched_address(self) -> int:
        """The address of which `heard` wants to hear: probed for or in use; 0: none."""
        return self._detector.address if self._detector.phase is not Phase.IDLE else 0

    def deadline(self) -> float | None:
        """When `handle_timer` is due next, None when nothing is waited for."""
        times = [self._send_due, self._choose_due, self._resume_due, self._detector.deadline()]
        if self.lease is not None and not self.lease.is_static:
            if self.state is ClientState.BOUND:
                times.append(self.lease.renew_at)
            if self.state in (ClientState.BOUND, ClientState.RENEWING):
                times.append(self.lease.rebind_at)
            times.append(self.lease.expires)
        due = [one for one in times if one is not None and one != FOREVER]
        return min(due, default=None)

    def handle_timer(self, now: float) -> list[Output]:
        """Do what is due at `now`."""
        lease = self.lease
        if self.state in HAVE_ADDRESS and lease is not None:
            if now >= lease.expires:
                self._lose("expired")
                self._move(ClientEvent.EXPIRE)
                self._rest(now)
            elif self.state in (ClientState.BOUND, ClientState.RENEWING) and now >= lease.rebind_at:
                self._move(ClientEvent.T2)
                self._extend(now)
            elif self.state is ClientState.BOUND and now >= lease.renew_at:
                self._move(ClientEvent.T1)
                self._extend(now)
        if self._resume_due is not None and now >= self._resume_due:
            self._resume_due = None
            if self.state is not ClientState.INIT:
                self._move(ClientEvent.START)
            self._discover(now)
        if self._choose_due is not None and now >= self._choose_due:
            self._choose(now)
        if self._send_due is not None and now >= self._send_due:
            self._send_again(now)
        while (verdict := self._detector.handle_timer(now)) is not Verdict.NOTHING:
            self._detected(verdict, now)
        return self._take(now)

    # What the states do.

    def _discover(self, now: float) -> None:
        self._move(ClientEvent.START)
        self._offers = []
        self._begin(MessageType.DISCOVER, now)
        self._send_again(now)

    def _offer(self, reply: Message, server: int, now: float) -> None:
        if not server or not reply.yiaddr or len(self._offers) >= OFFERS_MAX:
            return
        self._offers.append(_Offer(reply, server, now))
        if self._choose_due is None:
            self._choose_due = now + self.config.collect

    def _choose(self, now: float) -> None:
        # The longest lease first; among equals the first to answer.
        self._choose_due = None
        self._offers.sort(key=lambda one: -(option.u32(one.message.options.get(51)) or 0))
        offer = self._offers.pop(0)
        self._close("answered")
        self._move(ClientEvent.CHOOSE)
        self._request(offer.message.yiaddr, offer.server, now)

    def _request(self, address: int, server: int, now: float) -> None:
        self._asked = (address, server)
        # RFC 2131, 4.4.1: the REQUEST continues the transaction of its OFFER.
        self._begin(MessageType.REQUEST, now, xid=self._xid if server else None)
        self._send_again(now)

    def _extend(self, now: float) -> None:
        self._begin(MessageType.REQUEST, now)
        self._send_again(now)

    def _ack(self, reply: Message, server: int, hardware: bytes, now: float) -> None:
        if self.state is ClientState.REQUESTING and self._candidate is None:
            address, chosen = self._asked
            if reply.yiaddr != address or (chosen and server != chosen):
                return
        elif self.state is ClientState.RENEWING or self.state is ClientState.REBINDING:
            if self.lease is None or reply.yiaddr != int(self.lease.address.ip):
                return
        else:
            return
        lease = leases.from_ack(reply, self._sent_at)
        if lease is None or lease.expires <= now:
            return
        self._server_hardware = hardware
        self._send_due = None
        self._refusals = 0
        self._close("answered")
        if self.state is ClientState.REQUESTING:
            self._candidate = lease
            address = int(lease.address.ip)
            if self.config.is_probing:
                self._detector.begin(address, now)
            else:
                self._detector.skip(address, now)
                self._bind()
        else:
            self._candidate = lease
            self._bind()

    def _bind(self) -> None:
        assert self._candidate is not None  # ours: only called with one
        self.lease, self._candidate = self._candidate, None
        self.is_rebooting = False
        self._offers = []
        self._move(ClientEvent.BIND)
        self._out.append(Acquired(self.lease))

    def _nak(self, server: int, now: float) -> None:
        if (
            self.state not in (ClientState.REQUESTING, ClientState.RENEWING, ClientState.REBINDING)
            or self._candidate is not None
        ):
            return
        if not server or (self.state is ClientState.REQUESTING and self._asked[1] not in (0, server)):
            return
        self._close("refused")
        if self.state is ClientState.REQUESTING and self._fall_back(now):
            return
        if self.state is not ClientState.REQUESTING:
            self._lose("refused by the server")
        self._move(ClientEvent.NAK)
        self._refusals += 1
        self._rest(now + min(2.0 ** (self._refusals - 1) - 1.0, RETRANSMIT_MAX))

    def _fall_back(self, now: float) -> bool:
        self._offers = [one for one in self._offers if now - one.at < OFFER_LIFE]
        if not self._offers:
            return False
        offer = self._offers.pop(0)
        self._move(ClientEvent.FALL_BACK)
        self._xid = offer.message.xid
        self._request(offer.message.yiaddr, offer.server, now)
        return True

    def _detected(self, verdict: Verdict, now: float) -> None:
        address = self._detector.address
        if verdict is Verdict.PROBE:
            self._out.append(SendArp(address, is_probe=True))
        elif verdict is Verdict.ANNOUNCE:
            self._out.append(SendArp(address, is_probe=False))
        elif verdict is Verdict.FREE and self._candidate is not None:
            self._bind()
        elif verdict is Verdict.CONFLICT:
            self._conflict(now)

    def _conflict(self, now: float) -> None:
        lease = self._candidate or self.lease
        if lease is None:
            return
        if lease.is_static:
            self._lose("another host has the address")
            self._detector.stop()
            return
        self._candidate = None
        self.conflicts += 1
        self._begin(MessageType.DECLINE, now).outcome = "sent"
        self._transmit(
            MessageType.DECLINE, now, requested=int(lease.address.ip), server=int(lease.server), to_all=True
        )
        self._lose("another host has the address")
        self._move(ClientEvent.CONFLICT)
        times = self.config.times
        self._rest(
            now + (times.rate_limit_interval if self.conflicts >= times.max_conflicts else DECLINE_WAIT)
        )

    # Sending.

    def _send_again(self, now: float) -> None:
        transaction = self.history[-1]
        if transaction.attempts >= self._attempts_max():
            self._unanswered(now)
            return
        transaction.attempts += 1
        self._sent_at = now
        lease = self.lease
        if self.state is ClientState.SELECTING:
            self._transmit(MessageType.DISCOVER, now, to_all=True)
        elif self.state is ClientState.REQUESTING:
            self._transmit(
                MessageType.REQUEST, now, requested=self._asked[0], server=self._asked[1], to_all=True
            )
        elif lease is not None:
            to_all = self.state is ClientState.REBINDING
            self._transmit(MessageType.REQUEST, now, ciaddr=int(lease.address.ip), to_all=to_all)
            until = lease.expires if to_all else lease.rebind_at
            self._send_due = now + max((until - now) / 2, self.config.renew_minimum)
            return
        wait = min(self.config.retransmit * 2.0 ** (transaction.attempts - 1), RETRANSMIT_MAX)
        spread = min(1.0, wait / 4)
        self._send_due = now + wait + self._uniform(-spread, spread)

    def _attempts_max(self) -> int:
        if self.state is ClientState.SELECTING:
            return self.config.attempts
        if self.state is ClientState.REQUESTING:
            return REBOOT_ATTEMPTS if self.is_rebooting else REQUEST_ATTEMPTS
        return 1 << 30

    def _unanswered(self, now: float) -> None:
        self._close("unanswered")
        if self.state is ClientState.REQUESTING:
            if not self._fall_back(now):
                self._move(ClientEvent.GIVE_UP)
                self._rest(now)
            return
        self._move(ClientEvent.GIVE_UP)
        self._rest(now + self.config.error_pause)
        fallback = self.config.fallback
        if fallback is not None and self.lease is None:
            never = (FOREVER, FOREVER, FOREVER)
            self.lease = Lease(fallback, IPv4Address(0), *never, is_static=True)
            self._detector.skip(int(fallback.ip), now)
            self._out.append(Acquired(self.lease))

    def _transmit(
        self,
        kind: MessageType,
        now: float,
        *,
        ciaddr: int = 0,
        requested: int = 0,
        server: int = 0,
        to_all: bool = False,
    ) -> None:
        message = self._message(kind, now, xid=self._xid, ciaddr=ciaddr, requested=requested, server=server)
        if to_all or self.lease is None:
            self._out.append(Transmit(message.encode(), ciaddr, BROADCAST, BROADCAST_MAC))
        else:
            target = int(self.lease.server)
            self._out.append(Transmit(message.encode(), ciaddr, target, self._server_hardware))

    def _message(
        self,
        kind: MessageType,
        now: float,
        *,
        xid: int,
        ciaddr: int = 0,
        requested: int = 0,
        server: int = 0,
    ) -> Message:
        config = self.config
        options: dict[int, bytes] = {Code.MESSAGE_TYPE: bytes((kind,)), Code.CLIENT_ID: self._client_id}
        if requested:
            options[Code.REQUESTED_ADDRESS] = requested.to_bytes(4, "big")
        if server:
            options[Code.SERVER_ID] = server.to_bytes(4, "big")
        if kind not in (MessageType.DECLINE, MessageType.RELEASE):  # RFC 2131, table 5
            options[Code.PARAMETER_LIST] = config.parameters
            options[Code.MAX_SIZE] = (1500).to_bytes(2, "big")
            if config.host_name:
                options[Code.HOST_NAME] = config.host_name.encode()
            if config.vendor_class:
                options[Code.VENDOR_CLASS] = config.vendor_class.encode()
        seconds = min(int(now - self._began), 0xFFFF)
        # Without an address we can't be reached but by broadcast: we may speak for another's hardware
        # address.
        flags = 0 if ciaddr else BROADCAST_FLAG
        return Message(
            wire.BOOT_REQUEST, 0, xid, seconds, flags, ciaddr, 0, 0, 0, config.hardware, b"", b"", options
        )

    # Housekeeping.

    def _move(self, event: ClientEvent) -> None:
        self.state = TRANSITIONS[self.state, event]

    def _begin(self, kind: MessageType, now: float, *, xid: int | None = None) -> Transaction:
        if xid is None:
            self._xid = self._random_xid()
        transaction = Transaction(self._xid, kind, now)
        self.history.append(transaction)
        return transaction

    def _close(self, outcome: str, *, xid: int | None = None) -> None:
        for transaction in reversed(self.history):
            if transaction.xid == (self._xid if xid is None else xid) and transaction.outcome == "open":
                transaction.outcome = outcome
                return

    def _lose(self, reason: str) -> None:
        if self.lease is not None:
            self._out.append(Lost(self.lease, reason))
            self.lease = None

    def _rest(self, until: float | None) -> None:
        # Nothing is sent until then, and nothing that comes counts.
        self._send_due = self._choose_due = None
        self._resume_due = until
        self._candidate = None
        self._offers = []
        self.is_rebooting = False
        self._detector.stop()

    def _take(self, now: float) -> list[Output]:
        if self._resume_due is not None and now >= self._resume_due and self.state is ClientState.INIT:
            self._resume_due = None
            self._discover(now)
        if self.state is ClientState.BOUND and self.lease is not None and now >= self.lease.renew_at:
            self._move(ClientEvent.T1)
            self._extend(now)
        out, self._out = self._out, []
        return out

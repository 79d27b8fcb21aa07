"""The verdict for a frame at one port: parse, guard, fragments, flow, rules, in this order.

Invariant: every frame gets exactly one Reason, and is counted under it; `check` and `explain` ask the same
functions, so an explanation is what would happen. A fragment goes the way of its first; without a first it
is dropped.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from rayos_net.firewall.flow import Flow, FlowTable
from rayos_net.firewall.rule import Action
from rayos_net.firewall.table import Layer
from rayos_net.guard import Guard, Spoof
from rayos_net.packet import ETHER_ARP, ICMP, ICMPV6, UDP, Fault, Packet, inner, parse

FRAGMENTS_MAX: Final = 256  # datagrams in pieces at a time
FRAGMENT_SECONDS: Final = 30.0  # RFC 791, 3.2: the reassembly timer

ALLOW: Final = int(Action.ALLOW)
DENY: Final = int(Action.DENY)
REJECT: Final = int(Action.REJECT)

# Destination and source address, type, version and IHL, total length, flags and offset, protocol, addresses,
# ports.
_FAST: Final = struct.Struct("!6s6sHBxHxxHxBxxIIHH")
_FAST_SIZE: Final = _FAST.size
assert _FAST_SIZE == 38


class Reason(IntEnum):
    """Why a frame passes or not, beside the values of Fault (1..) and Spoof (32..)."""

    RULE = 64  # a rule decided
    DEFAULT = 65  # no rule matched
    REPLY = 66  # belongs to a flow that is allowed
    RELATED = 67  # an ICMP error about such a flow
    ARP = 68  # passed the guard; ARP has no rules
    NEIGHBOUR_DISCOVERY = 71  # likewise: IPv6's ARP (RFC 4861)
    DHCP = 72  # likewise: with our server alone
    FRAGMENT = 69  # goes the way of its first fragment
    FRAGMENT_WITHOUT_FIRST = 70


@dataclass(frozen=True, slots=True)
class Explanation:
    """The fate of a frame, and the reason."""

    action: Action
    reason: str  # a name in Fault, Spoof or Reason
    layer: str = ""  # of the table
    rule: str = ""
    origin: str = ""  # where the rule is inherited from
    audit_rule: str = ""  # an audit-only rule that matched before

    def __str__(self) -> str:
        rule = f" by rule {self.rule}" if self.rule else ""
        origin = f" (from {self.origin})" if self.origin else ""
        return f"{self.action.name.lower()}: {self.reason.lower()}{rule}{origin}"


class GuestPort:
    """One port of a guest: its guard, its flows, its counters."""

    def __init__(self, guard: Guard, flows: FlowTable) -> None:
        self.guard = guard
        self.flows = flows
        self.counters: dict[int, int] = {}
        #: The flow that the last frame checked was judged by, None when something else decided.
        self.flow: Flow | None = None
        #: Whether the last frame checked was no sound one; means nothing while there is a `flow`.
        self.is_malformed = False
        self._fragments: dict[tuple[bool, int, int, int, int], tuple[int, float]] = {}

    def check(self, frame: bytes, outgoing: bool, now: float) -> int:
        """ALLOW, DENY or REJECT for a frame without its virtio-net header. `now` in seconds, never going
        back.
        """
        # The fast shape: whole IPv4 TCP or UDP without options, from this guest, not DHCP.
        if outgoing and len(frame) >= 54:
            _, mac, kind, first, total, fragment, protocol, source, destination, source_port, port = (
                _FAST.unpack_from(frame)
            )
            if (
                kind == 0x0800
                and first == 0x45
                and not fragment & 0x3FFF
                and 40 <= total <= len(frame) - 14
                and (protocol == 6 or protocol == 17)
                and mac == self.guard.mac
                and source in self.guard.addresses
                and frame[0] != 1
                and port != 67
                and port != 68
                and source_port != 67
                and (frame[46] >= 0x50 if protocol == 6 else 28 <= (frame[38] << 8 | frame[39]) + 20 <= total)
                and (protocol == 17 or (frame[46] >> 2 & 0x3C) + 20 <= total)
            ):
                self.flow = flow = self.flows.judge(
                    True, (0x400 | protocol, source, destination, source_port, port), now
                )
                if flow.action != ALLOW:
                    self._count(Reason.RULE if flow.rule >= 0 else Reason.DEFAULT)
                return flow.action
        return self._check_any(frame, outgoing, now)

    def explain(self, frame: bytes, outgoing: bool, now: float) -> Explanation:
        """Returns the verdict of `check` on this frame and the rule that decides. Nothing is changed or counted."""
        packet = parse(frame)
        if isinstance(packet, Fault):
            return Explanation(Action.DENY, packet.name)
        spoof = self._guard(frame, packet, outgoing)
        if spoof:
            return Explanation(Action.DENY, Spoof(spoof).name)
        basic = self._basic(frame, packet, outgoing)
        if basic is not None:
            return Explanation(Action.ALLOW, basic.name)
        if packet.offset:
            action, reason = self._later_fragment(packet, outgoing, now)
            return Explanation(Action(action), reason.name)
        key = _key(packet)
        if self._is_related(frame, packet, outgoing, now):
            return Explanation(Action.ALLOW, Reason.RELATED.name)
        table = self.flows.table
        opener = self.flows.opener(outgoing, key, now)
        if opener is not None:
            rule = table.rules[opener.rule] if opener.rule >= 0 else None
            return Explanation(
                Action.ALLOW,
                Reason.REPLY.name,
                rule=rule.name if rule else "",
                origin=rule.origin if rule else "",
            )
        number, layer = self.flows.classify(outgoing, key)
        audit_number, _ = table.plane(outgoing=outgoing, version=packet.version, audit=True).find(
            packet.protocol, packet.source, packet.destination, packet.source_port, packet.destination_port
        )
        audit = (
            table.rules[audit_number].name
            if audit_number >= 0 and (number < 0 or audit_number < number)
            else ""
        )
        action = table.action(number, outgoing=outgoing)
        if number < 0:
            return Explanation(action, Reason.DEFAULT.name, Layer.DEFAULT.name, audit_rule=audit)
        rule = table.rules[number]
        return Explanation(action, Reason.RULE.name, layer.name, rule.name, rule.origin, audit)

    def _check_any(self, frame: bytes, outgoing: bool, now: float) -> int:
        self.flow = None
        packet = parse(frame)
        self.is_malformed = isinstance(packet, Fault) and packet.is_malformed
        if isinstance(packet, Fault):
            self._count(packet)
            return DENY
        spoof = self._guard(frame, packet, outgoing)
        if spoof:
            self._count(spoof)
            return DENY
        basic = self._basic(frame, packet, outgoing)
        if basic is not None:
            self._count(basic)
            return ALLOW
        if packet.offset:
            action, reason = self._later_fragment(packet, outgoing, now)
            self._count(reason)
            return action
        if self._is_related(frame, packet, outgoing, now):
            self._count(Reason.RELATED)
            return ALLOW
        self.flow = flow = self.flows.judge(outgoing, _key(packet), now)
        if packet.fragment >= 0:
            self._first_fragment(packet, outgoing, flow.action, now)
        if flow.action != ALLOW:
            self._count(Reason.RULE if flow.rule >= 0 else Reason.DEFAULT)
        return flow.action

    def _guard(self, frame: bytes, packet: Packet, outgoing: bool) -> int:
        return self.guard.check_out(frame, packet) if outgoing else self.guard.check_in(packet)

    def _basic(self, frame: bytes, packet: Packet, outgoing: bool) -> Reason | None:
        # What a guest needs to have a network at all; the guard has looked at it closely, rules don't.
        if packet.ethertype == ETHER_ARP:
            return Reason.ARP
        if packet.fragment >= 0:
            return None
        if packet.protocol == UDP and packet.version == 4 and self.guard.server:
            if (
                outgoing
                and packet.destination_port == 67
                and packet.destination in (self.guard.server, 0xFFFFFFFF)
            ):
                return Reason.DHCP
            if not outgoing and packet.destination_port == 68 and packet.source_port == 67:
                return Reason.DHCP
        if packet.protocol == ICMPV6 and frame[packet.transport] in (135, 136):
            return Reason.NEIGHBOUR_DISCOVERY
        return None

    def _is_related(self, frame: bytes, packet: Packet, outgoing: bool, now: float) -> bool:
        if packet.protocol not in (ICMP, ICMPV6):
            return False
        about = inner(frame, packet)
        if about is None:
            return False
        protocol, source, destination, source_port, destination_port = about
        key = (packet.version << 8 | protocol, source, destination, source_port, destination_port)
        # It must be about a flow of the one whom it is sent to.
        return source == packet.destination and self.flows.is_related(outgoing, key, now)

    def _first_fragment(self, packet: Packet, outgoing: bool, action: int, now: float) -> None:
        fragments = self._fragments
        if len(fragments) >= FRAGMENTS_MAX:
            live = {key: value for key, value in fragments.items() if value[1] > now}
            self._fragments = fragments = live if len(live) < FRAGMENTS_MAX else {}
        fragments[_fragment_key(packet, outgoing)] = (action, now + FRAGMENT_SECONDS)

    def _later_fragment(self, packet: Packet, outgoing: bool, now: float) -> tuple[int, Reason]:
        known = self._fragments.get(_fragment_key(packet, outgoing))
        if known is None or known[1] <= now:
            return DENY, Reason.FRAGMENT_WITHOUT_FIRST
        return known[0], Reason.FRAGMENT

    def _count(self, reason: int) -> None:
        self.counters[reason] = self.counters.get(reason, 0) + 1


def reason_name(reason: int) -> str:
    """The word for a key of GuestPort.counters."""
    for kind in (Fault, Spoof, Reason):
        if reason in kind._value2member_map_:
            return str(kind(reason).name).lower()
    raise ValueError(f"{reason} is no reason")


def _key(packet: Packet) -> tuple[int, int, int, int, int]:
    return (
        packet.version << 8 | packet.protocol,
        packet.source,
        packet.destination,
        packet.source_port,
        packet.destination_port,
    )


def _fragment_key(packet: Packet, outgoing: bool) -> tuple[bool, int, int, int, int]:
    # The protocol too: RFC 791, 3.2.
    return outgoing, packet.version << 8 | packet.protocol, packet.source, packet.destination, packet.fragment

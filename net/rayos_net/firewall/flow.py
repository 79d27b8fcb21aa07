"""Flows: the verdict for a 5-tuple, remembered, and the replies of what was allowed.

Invariant: a remembered verdict counts only with the table that gave it (its generation) and until its
deadline; a reply is let through only while its flow is allowed by the *present* table. Memory is bounded:
two halves in each direction, of which the older is dropped when the newer is full, so flows in use survive a
flood of new ones.

`FlowTable.judge` is the hot path: one tuple, one dictionary lookup, two comparisons.
"""

from collections import deque
from typing import Final, NamedTuple

from rayos_net.firewall.memory import FlowMemory
from rayos_net.firewall.rule import Action
from rayos_net.firewall.table import NO_RULE, Layer, Table
from rayos_net.packet import ICMP, ICMPV6, TCP

FLOWS_MAX: Final = 16384  # in each half of each direction
EVENTS_MAX: Final = 1024
TCP_SECONDS: Final = 3600.0  # without a packet
UDP_SECONDS: Final = 180.0  # RFC 4787, 4.3, REQ-5: at least two minutes
ICMP_SECONDS: Final = 60.0  # RFC 5508, 3.2: at least a minute
DENIED_SECONDS: Final = 60.0

NEVER: Final = float("inf")

FlowKey = tuple[
    int, int, int, int, int
]  # version << 8 | protocol, source, destination, source port, destination port


class Flow:
    """A remembered verdict. `rule` is a number in the table's rules, or NO_RULE for the default."""

    __slots__ = ("action", "deadline", "generation", "is_reply", "lifetime", "partner", "renew", "rule")

    def __init__(
        self, generation: int, action: int, rule: int, deadline: float, lifetime: float, is_reply: bool
    ) -> None:
        self.generation = generation
        self.action = action
        self.rule = rule
        self.deadline = deadline
        self.lifetime = lifetime
        self.is_reply = is_reply
        self.partner: Flow | None = None
        self.renew = NEVER  # a deadline beyond this is written down


class FlowEvent(NamedTuple):
    """A new flow that a rule with `log` or `audit_only` matched."""

    now: float
    outgoing: bool
    key: FlowKey
    rule: str
    action: Action
    audit_only: bool


class FlowTable:
    """The firewall of one port: a compiled table and the flows seen through it."""

    def __init__(self, table: Table, *, flows_max: int = FLOWS_MAX, memory: FlowMemory | None = None) -> None:
        """With `memory` the flows that are let through are written there; see `recall`."""
        self.table = table
        self.generation = table.generation
        self.events: deque[FlowEvent] = deque(maxlen=EVENTS_MAX)
        self.noted = 0  # events in all, also those that were given up for newer ones
        self.cached = 0  # verdicts from memory
        self.replies = 0
        self.layers = [0] * len(Layer)
        self._max = flows_max
        self._memory = memory
        self._out: dict[FlowKey, Flow] = {}
        self._out_old: dict[FlowKey, Flow] = {}
        self._in: dict[FlowKey, Flow] = {}
        self._in_old: dict[FlowKey, Flow] = {}

    def replace(self, table: Table) -> None:
        """Use another table from the next packet on. Remembered verdicts of the old one count no more."""
        self.table = table
        self.generation = table.generation

    def recall(self, now: float) -> int:
        """Goes on with the flows that a predecessor let through, as far as the table still does; how many there are.
        Call it once, before the first frame.
        """
        if self._memory is None:
            return 0
        for outgoing, key, deadline in self._memory.recall(now, TCP_SECONDS):
            # Of no table's generation: the present one is asked before it counts.
            flow = Flow(0, Action.ALLOW, NO_RULE, deadline, _lifetime(key[0] & 0xFF), False)
            flow.renew = deadline + flow.lifetime / 4
            (self._out if outgoing else self._in)[key] = flow
        return self.sizes()

    def judge(self, outgoing: bool, key: FlowKey, now: float) -> Flow:
        """The verdict for a packet of the flow `key`, which is remembered. `now` in seconds, never going
        back.
        """
        flow = (self._out if outgoing else self._in).get(key)
        if flow is not None and flow.generation == self.generation and now < flow.deadline:
            self.cached += 1
            if flow.action == 1:
                flow.deadline = deadline = now + flow.lifetime
                if flow.partner is not None:
                    flow.partner.deadline = deadline
                if deadline > flow.renew:
                    self._keep(flow, outgoing, key)
            return flow
        return self._judge_new(outgoing, key, now)

    def is_related(self, outgoing: bool, key: FlowKey, now: float) -> bool:
        """Whether an ICMP error may pass: `key` is the flow inside it, which goes the other way."""
        return self._live(not outgoing, key, now) is not None

    def classify(self, outgoing: bool, key: FlowKey) -> tuple[int, Layer]:
        """Classifies without memory; returns the rule's number and the layer that knew."""
        kind, source, destination, source_port, destination_port = key
        plane = self.table.plane(outgoing=outgoing, version=kind >> 8)
        return plane.find(kind & 0xFF, source, destination, source_port, destination_port)

    def sizes(self) -> int:
        """How many flows are remembered."""
        return len(self._out) + len(self._out_old) + len(self._in) + len(self._in_old)

    def opener(self, outgoing: bool, key: FlowKey, now: float) -> Flow | None:
        """The allowed flow that this one is the reply of."""
        flow = self._live(not outgoing, _reversed(key), now)
        return None if flow is None or flow.is_reply else flow

    def _judge_new(self, outgoing: bool, key: FlowKey, now: float) -> Flow:
        old = (self._out_old if outgoing else self._in_old).pop(key, None)
        if old is not None and old.generation == self.generation and now < old.deadline:
            self._remember(outgoing, key, old)
            return self.judge(outgoing, key, now)
        lifetime = _lifetime(key[0] & 0xFF)
        opener = self._live(not outgoing, _reversed(key), now)
        if opener is not None and not opener.is_reply:
            self.replies += 1
            flow = Flow(self.generation, Action.ALLOW, opener.rule, now + lifetime, lifetime, True)
            flow.partner = opener
            opener.partner = flow
            opener.deadline = now + lifetime
            flow.renew = opener.renew
            self._remember(outgoing, key, flow)
            return flow
        number, layer = self.classify(outgoing, key)
        self.layers[layer] += 1
        action = self.table.action(number, outgoing=outgoing)
        if action is not Action.ALLOW:
            lifetime = DENIED_SECONDS
        flow = Flow(self.generation, action, number, now + lifetime, lifetime, False)
        self._remember(outgoing, key, flow)
        if action is Action.ALLOW:
            self._keep(flow, outgoing, key)
        if self.table.has_audit or (number >= 0 and self.table.rules[number].log):
            self._note(outgoing, key, number, now)
        return flow

    def _live(self, outgoing: bool, key: FlowKey, now: float) -> Flow | None:
        # The allowed flow of that key; under a new table it is asked again whether it still is.
        flow = (self._out if outgoing else self._in).get(key)
        if flow is None:
            flow = (self._out_old if outgoing else self._in_old).get(key)
        if flow is None or flow.action != Action.ALLOW or flow.deadline <= now:
            return None
        if flow.generation != self.generation:
            if flow.is_reply:
                return None
            number, _ = self.classify(outgoing, key)
            flow.rule = number
            flow.action = self.table.action(number, outgoing=outgoing)
            flow.generation = self.generation
            if flow.action != Action.ALLOW:
                return None
        return flow

    def _remember(self, outgoing: bool, key: FlowKey, flow: Flow) -> None:
        flows = self._out if outgoing else self._in
        if len(flows) >= self._max:
            if outgoing:
                self._out_old, self._out = flows, {}
                flows = self._out
            else:
                self._in_old, self._in = flows, {}
                flows = self._in
        flows[key] = flow

    def _keep(self, flow: Flow, outgoing: bool, key: FlowKey) -> None:
        if self._memory is None:
            return
        if flow.is_reply:
            outgoing, key = not outgoing, _reversed(key)
        self._memory.keep(outgoing, key, flow.deadline)
        flow.renew = flow.deadline + flow.lifetime / 4
        if flow.partner is not None:
            flow.partner.renew = flow.renew

    def _note(self, outgoing: bool, key: FlowKey, number: int, now: float) -> None:
        rules = self.table.rules
        if number >= 0 and rules[number].log:
            rule = rules[number]
            self.noted += 1
            self.events.append(FlowEvent(now, outgoing, key, rule.name, rule.action, False))
        if self.table.has_audit:
            kind, source, destination, source_port, destination_port = key
            plane = self.table.plane(outgoing=outgoing, version=kind >> 8, audit=True)
            found, _ = plane.find(kind & 0xFF, source, destination, source_port, destination_port)
            # Only where it would have been looked at before the rule that decided.
            if found != NO_RULE and (number < 0 or found < number):
                rule = rules[found]
                self.noted += 1
                self.events.append(FlowEvent(now, outgoing, key, rule.name, rule.action, True))


def _reversed(key: FlowKey) -> FlowKey:
    return key[0], key[2], key[1], key[4], key[3]


def _lifetime(protocol: int) -> float:
    if protocol == TCP:
        return TCP_SECONDS
    if protocol in (ICMP, ICMPV6):
        return ICMP_SECONDS
    return UDP_SECONDS

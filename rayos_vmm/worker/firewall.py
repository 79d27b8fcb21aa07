"""The firewall and spoof guard of one guest's network card: `rayos_net.firewall` answers what
`rayos_devices.net.filter` asks.

What it was told last is in its state store before it says so, so a worker's successor judges by the same rules from
its first frame on, and knows the flows that are open (`rayos_net.firewall.memory`). A new list of rules is compiled
beside the old one and takes its place between two frames: there is none that meets half of it, or neither. Which
addresses the guest has leased is on a page (`addresses.py`).
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address
from itertools import islice
from time import monotonic
from typing import Any, Final

import msgspec

from rayos_devices.net.outcome import HOLDS, MALFORMED, SLOT_SHIFT, SLOTS
from rayos_devices.state import StateStore
from rayos_net.firewall import text
from rayos_net.firewall.flow import FlowEvent, FlowTable
from rayos_net.firewall.memory import FlowMemory
from rayos_net.firewall.reject import answer
from rayos_net.firewall.rule import Rule, RuleError, parse
from rayos_net.firewall.table import Layer, Table
from rayos_net.firewall.verdict import REJECT, GuestPort, reason_name
from rayos_net.guard import Guard
from rayos_net.packet import Fault, Packet
from rayos_net.packet import parse as parse_packet
from rayos_vmm.shared.addresses import AddressView
from rayos_vmm.shared.view import Verdict

#: Rules of one guest, its own and inherited, and bytes of them as JSON.
RULES_MAX: Final = SLOTS - 2
BYTES_MAX: Final = 1 << 20
#: Flows in each half of each direction: some megabytes at worst.
FLOWS_MAX: Final = 4096
#: Answers to refused frames that may wait, and a second.
ANSWERS_MAX: Final = 16
ANSWERS_PER_SECOND: Final = 100
#: Verdicts that a trace keeps, and seconds for which it goes on when nobody asks for them any more.
TRACE_MAX: Final = 512
TRACE_AT_ONCE: Final = 128
TRACE_SECONDS: Final = 5.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings from the service: everything but the leased addresses. `rules` are tables of
    `rayos_net.firewall.rule.parse` with their name and origin beside.
    """

    revision: int = 0
    rules: list[dict[str, Any]] = []


class NoGuard(Guard):
    """A guest that may claim to be anybody."""

    def check_out(self, frame: bytes, packet: Packet) -> int:
        return 0

    def check_in(self, packet: Packet) -> int:
        return 0


class PortFirewall:
    """A `rayos_devices.net.filter.Judge`. `server` is our DHCP server's address, 0 for none."""

    def __init__(
        self,
        mac: bytes,
        *,
        server: int = 0,
        is_guarded: bool = True,
        fixed: Iterable[int] = (),
        view: AddressView | None = None,
        store: StateStore | None = None,
        settings: Settings | None = None,
        flows: memoryview | None = None,
    ) -> None:
        """`fixed` addresses need no lease. `settings` holds unless the store has newer ones. `flows` is MEMORY_BYTES in
        which the flows of a predecessor are, if there was one. Errors: RuleError.
        """
        self.mac = mac
        self.epoch = memoryview(array("Q", [1]))
        self.hits = memoryview(array("Q", bytes(8 * SLOTS)))
        self.answers: deque[tuple[bool, bytes]] = deque(maxlen=ANSWERS_MAX)
        self._view = view or AddressView(-1)
        self.page = self._view.word
        self._fixed = frozenset(fixed)
        self._version = -1
        self._store = store
        memory = None if flows is None else FlowMemory(flows)
        self._port = GuestPort(
            (Guard if is_guarded else NoGuard)(mac, server=server),
            FlowTable(Table(), flows_max=FLOWS_MAX, memory=memory),
        )
        self._counts: Counter[tuple[str, str]] = Counter()
        self._told = 0
        self._answer_second = 0
        self._answered = 0
        self._trace: deque[tuple[int, Verdict]] = deque(maxlen=TRACE_MAX)
        self._traced = int(monotonic() * 1e6)  # beyond every number of a predecessor's
        self._trace_until = 0.0
        #: Called when a trace has something to say.
        self.on_verdict: Callable[[], None] = lambda: None
        self.settings = settings or Settings()
        saved = None if store is None else store.load(lambda _queue, _index: True)
        if saved is not None:
            self.settings = max(
                self.settings, msgspec.json.decode(saved, type=Settings), key=lambda one: one.revision
            )
        self._compiled = _Compiled()
        self._port.flows.replace(self._compiled.table(self.settings.rules))
        self._port.flows.recall(monotonic())

    # -- the data path -------------------------------------------------------------------------------------------

    def judge(self, frame: bytes, is_outgoing: bool, now: float) -> int:
        """See `rayos_devices.net.filter.Judge`."""
        self._follow_addresses()
        port = self._port
        action = port.check(frame, is_outgoing, now)
        flow = port.flow
        if now < self._trace_until:
            self._note(frame, is_outgoing, now, action)
        if action == REJECT:
            self._reject(frame, is_outgoing, now)
        if flow is None:
            return MALFORMED if port.is_malformed else action
        slot = flow.rule + 1
        if action == REJECT or now < self._trace_until:
            self.hits[slot] += 1
            return action
        return action | HOLDS | slot << SLOT_SHIFT

    def _follow_addresses(self) -> None:
        if self.page[0] != self._version:
            self._version, leased = self._view.read()
            self._port.guard.bind(self._fixed.union(leased))

    def _reject(self, frame: bytes, is_outgoing: bool, now: float) -> None:
        if int(now) != self._answer_second:
            self._answer_second, self._answered = int(now), 0
        packet = parse_packet(frame)
        if self._answered < ANSWERS_PER_SECOND and not isinstance(packet, Fault):
            reply = answer(frame, packet)
            if reply is not None:
                self._answered += 1
                self.answers.append((is_outgoing, reply))

    # -- the service ---------------------------------------------------------------------------------------------

    def apply(self, settings: Settings) -> int:
        """Judge by these rules from the next frame on; the revision that holds now. An older revision changes nothing.

        Errors: RuleError, and nothing was changed.
        """
        if settings.revision < self.settings.revision:
            return self.settings.revision
        if settings.rules != self.settings.rules:
            table = self._compiled.table(settings.rules)
            self._save(settings)
            self._fold(table)
            self._port.flows.replace(table)
            self.epoch[0] += 1
        else:
            self._save(settings)
        self.settings = settings
        return settings.revision

    def _save(self, settings: Settings) -> None:
        if self._store is not None:
            self._store.save(msgspec.json.encode(settings))

    def _fold(self, table: Table) -> None:
        """Keep the counts of the rules that are about to lose their numbers, and stay."""
        for index, rule in enumerate(self._port.flows.table.rules, 1):
            if self.hits[index]:
                self._counts[rule.origin, rule.name] += self.hits[index]
                self.hits[index] = 0
        if self._counts:
            stay = {(rule.origin, rule.name) for rule in table.rules}
            self._counts = Counter({key: count for key, count in self._counts.items() if key in stay})

    def explain(self, words: str) -> Verdict:
        """Says what would happen to a packet (`rayos_net.firewall.text`), and by which rule. Errors: text.BadText."""
        self._follow_addresses()
        frame, outgoing = text.frame(words, guest=self.mac, other=b"\x52\x59\0\0\0\0")
        return _explanation(self._port, frame, outgoing, monotonic())

    def trace(self, after: int | None, now: float) -> tuple[int, list[Verdict]]:
        """Verdicts behind number `after` (None: none of them), and the number of the last of these.

        While somebody asks every frame is judged anew.
        """
        if now >= self._trace_until:
            self.epoch[0] += 1
        self._trace_until = now + TRACE_SECONDS
        if after is None:
            return self._traced, []
        found = [one for one in self._trace if one[0] > after][:TRACE_AT_ONCE]
        told = [msgspec.structs.replace(entry, number=number) for number, entry in found]
        return found[-1][0] if found else after, told

    def _note(self, frame: bytes, is_outgoing: bool, now: float, action: int) -> None:
        packet = parse_packet(frame)
        told = _explanation(self._port, frame, is_outgoing, now)
        self._traced += 1
        direction = "out" if is_outgoing else "in"
        entry = msgspec.structs.replace(told, direction=direction, packet=text.describe(packet))
        self._trace.append((self._traced, entry))
        self.on_verdict()

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready counters: of each layer, and of reasons beside rules."""
        flows, counters = self._port.flows, self._port.counters
        return {
            "revision": self.settings.revision,
            "addresses": [str(IPv4Address(one)) for one in sorted(self._port.guard.addresses)],
            "flows": flows.sizes(),
            "layers": {
                "flow": flows.cached,
                "reply": flows.replies,
                **{layer.name.lower(): flows.layers[layer] for layer in Layer},
            },
            "reasons": {reason_name(reason): count for reason, count in sorted(counters.items())},
            "default": self.hits[0],
            "rules": len(flows.table.rules),
        }

    def counts(self) -> list[int]:
        """Frames that each rule decided, in the order of `settings.rules`."""
        found = [0] * len(self.settings.rules)
        order = sorted(
            range(len(found)), key=lambda index: int(self.settings.rules[index].get("priority", 100))
        )
        for slot, (index, rule) in enumerate(zip(order, self._port.flows.table.rules, strict=True), 1):
            found[index] = self._counts[rule.origin, rule.name] + self.hits[slot]
        return found

    def take_events(self, limit: int) -> tuple[list[dict[str, Any]], int]:
        """New flows that rules with `log` or `audit_only` matched since the last call: the first `limit`, and how many
        there were beside them."""
        flows = self._port.flows
        taken = [_told(event) for event in islice(flows.events, limit)]
        more = flows.noted - self._told - len(taken)
        self._told = flows.noted
        flows.events.clear()
        return taken, more


def decode(data: bytes) -> Settings:
    """Settings from JSON. Errors: RuleError for what makes none, ValueError for what is not JSON of theirs."""
    settings = msgspec.json.decode(data, type=Settings)
    if len(settings.rules) > RULES_MAX:
        raise RuleError(f"{len(settings.rules)} rules exceed {RULES_MAX}")
    return settings


def explain_alone(
    mac: bytes, rules: Sequence[dict[str, Any]], addresses: Iterable[int], server: int, words: str
) -> Verdict:
    """`PortFirewall.explain` for a guest that does not run. Errors: RuleError, text.BadText."""
    settings = Settings(rules=list(rules))
    return PortFirewall(mac, server=server, fixed=addresses, settings=settings).explain(words)


class _Compiled:
    """Rules as they were given, and what came of them: a change costs what has changed."""

    def __init__(self) -> None:
        self._given: Sequence[dict[str, Any]] = ()
        self._rules: list[Rule] = []
        self._table: Table | None = None

    def table(self, rules: Sequence[dict[str, Any]]) -> Table:
        """Errors: RuleError, and nothing was changed."""
        before, made = self._given, self._rules
        head = _common(before, rules)
        tail = _common(before[head:][::-1], rules[head:][::-1])
        stop = len(before) - tail
        known = {_key(given): at for at, given in enumerate(before[head:stop], head)}
        middle = []
        for given in rules[head : len(rules) - tail]:
            at = known.get(_key(given))
            middle.append(made[at] if at is not None and before[at] == given else _rule(given))
        found = [*made[:head], *middle, *made[stop:]]
        table = Table(found, previous=self._table)
        self._given, self._rules, self._table = rules, found, table
        return table


def _common(some: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> int:
    """How many of the first are equal."""
    for at, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return at
    return min(len(some), len(others))


def _key(given: dict[str, Any]) -> tuple[str, str]:
    return given.get("origin", ""), given.get("name", "")


def _rule(given: dict[str, Any]) -> Rule:
    table = dict(given)
    name, origin = str(table.pop("name", "")), str(table.pop("origin", ""))
    return parse(name, table, origin=origin)


def _told(event: FlowEvent) -> dict[str, Any]:
    version, protocol = event.key[0] >> 8, event.key[0] & 0xFF
    packet = Packet(b"", b"", 0, version, protocol, *event.key[1:], -1, 0, 0, 0)
    return {
        "direction": "out" if event.outgoing else "in",
        "packet": text.describe(packet),
        "rule": event.rule,
        "action": event.action.name.lower(),
        "audit_only": event.audit_only,
    }


def _explanation(port: GuestPort, frame: bytes, outgoing: bool, now: float) -> Verdict:
    told = port.explain(frame, outgoing, now)
    return Verdict(
        action=told.action.name.lower(),
        reason=told.reason.lower(),
        rule=told.rule,
        origin=told.origin,
        layer=told.layer.lower(),
        audit_rule=told.audit_rule,
    )

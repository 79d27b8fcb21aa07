"""Rules compiled into a table whose lookup does not grow with their number.

A plane is for one direction and IP version. Its rules are numbered in the order in which they are looked at;
a lookup returns the lowest number that matches. Three layers, each exact, so that the minimum over them is
the answer of a linear scan:

* deny list: the leading run of rules that only name hosts to be refused. A hit is final: nothing comes
before it. * exact match: rules in which every field is any or one value, in a hash for each of the commonest
shapes. * ranges: everything else. For each field, the sorted bounds of all rules' ranges, and for each
interval between two of them
  the set of rules that hold there, as the bits of an integer (Lakshman and Stiliadis, SIGCOMM 1998,
  "bit-parallelism"). A lookup is five searches, four ANDs and the lowest set bit.

Invariant: a table is never changed after it was made; a new one takes its place by one assignment, with a
higher generation. One that is made with its predecessor at hand takes over what has stayed: what was worked out
about the same `Rule` objects, and planes in which nothing but the rules' numbers has changed.
"""

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from enum import IntEnum
from operator import attrgetter
from typing import Final, NamedTuple

from rayos_net.firewall.rule import PORTLESS, WITH_PORTS, Action, Direction, Rule

NO_RULE: Final = -1
SHAPES_MAX: Final = 3  # hashes that each lookup asks
SHAPE_MIN: Final = 4  # rules for which a hash of their own pays
EXPAND_MAX: Final = 64  # exact entries that one rule may take

_Range = tuple[int, int]
_Fields = tuple[int, int, int, int, int]  # protocol, source, destination, source port, destination port
_Key = tuple[Direction, int, bool]  # IP version, audit
_PLANES: Final[tuple[_Key, ...]] = tuple(itertools.product(Direction, (4, 6), (False, True)))
_generations = itertools.count(1)


class Layer(IntEnum):
    """Which part of the table decided; counted."""

    DENY_LIST = 0
    EXACT = 1
    RANGES = 2
    DEFAULT = 3


class Plane:
    """The rules of one direction and IP version."""

    def __init__(
        self, rules: Sequence["_Prepared"], numbers: list[int], version: int, previous: "Plane | None" = None
    ) -> None:
        """`rules` in order, `numbers` those in the whole table."""
        self.numbers = numbers
        self.prepared = rules
        bits = 32 if version == 4 else 128
        own = [one.by_version[version] for one in rules]
        ranges = [one.ranges for one in own]
        self.deny_source: dict[int, int] = {}
        self.deny_destination: dict[int, int] = {}
        lead = self._take_deny_list(rules, ranges)
        self.shapes: list[tuple[_Fields, dict[tuple[int, ...], int]]] = []
        rest = self._take_exact(lead, own)
        self.rest = rest
        self.rest_first = rest[0] if rest else len(rules)
        limits = (256, 1 << bits, 1 << bits, 65536, 65536)
        left = [ranges[position] for position in rest]
        columns = [[one[field] for one in left] for field in range(5)]
        self.columns: list[tuple[list[list[_Range] | None], tuple[list[int], list[int]]]] = []
        for field, column in enumerate(columns):
            before = None if previous is None else previous.columns[field]
            if before is None or before[0] != column:
                before = column, _intervals(column, limits[field])
            self.columns.append(before)
        (protocols, sources, destinations, source_ports, destination_ports) = (
            found for _, found in self.columns
        )
        self.protocol_masks = _spread(*protocols)
        self.source_bounds, self.source_masks = sources
        self.destination_bounds, self.destination_masks = destinations
        self.source_port_bounds, self.source_port_masks = source_ports
        self.destination_port_bounds, self.destination_port_masks = destination_ports

        self.has_sources = len(self.source_bounds) > 1
        self.has_destinations = len(self.destination_bounds) > 1
        self.has_source_ports = len(self.source_port_bounds) > 1
        self.has_destination_ports = len(self.destination_port_bounds) > 1

    def renumbered(self, numbers: list[int]) -> "Plane":
        """The same rules under other numbers."""
        other = copy(self)
        other.numbers = numbers
        return other

    def find(
        self, protocol: int, source: int, destination: int, source_port: int, destination_port: int
    ) -> tuple[int, Layer]:
        """The number of the first rule that matches (NO_RULE: none), and the layer that knew it."""
        found = self.deny_source.get(source, NO_RULE) if self.deny_source else NO_RULE
        if self.deny_destination:
            other = self.deny_destination.get(destination, NO_RULE)
            if found < 0 or 0 <= other < found:
                found = other
        if found >= 0:
            return self.numbers[found], Layer.DENY_LIST
        best = NO_RULE
        for shape, entries in self.shapes:
            key = (
                protocol if shape[0] else 0,
                source if shape[1] else 0,
                destination if shape[2] else 0,
                source_port if shape[3] else 0,
                destination_port if shape[4] else 0,
            )
            position = entries.get(key, NO_RULE)
            if position >= 0 and (best < 0 or position < best):
                best = position
        if best < 0 or best > self.rest_first:
            mask = self.protocol_masks[protocol]
            if self.has_sources:  # else one interval that holds every rule
                mask &= self.source_masks[bisect_right(self.source_bounds, source) - 1]
            if self.has_destinations:
                mask &= self.destination_masks[bisect_right(self.destination_bounds, destination) - 1]
            if self.has_source_ports:
                mask &= self.source_port_masks[bisect_right(self.source_port_bounds, source_port) - 1]
            if self.has_destination_ports:
                mask &= self.destination_port_masks[
                    bisect_right(self.destination_port_bounds, destination_port) - 1
                ]
            if mask:
                position = self.rest[(mask & -mask).bit_length() - 1]
                if best < 0 or position < best:
                    return self.numbers[position], Layer.RANGES
        if best >= 0:
            return self.numbers[best], Layer.EXACT
        return NO_RULE, Layer.DEFAULT

    def _take_deny_list(
        self, rules: Sequence["_Prepared"], ranges: Sequence[Sequence[list[_Range] | None]]
    ) -> int:
        for position, one in enumerate(rules):
            rule = one.rule
            protocol, source, destination, source_port, destination_port = ranges[position]
            hosts = source or destination
            is_plain = not (protocol or source_port or destination_port or (source and destination))
            if rule.action is Action.ALLOW or not hosts or not is_plain:
                return position
            if any(first != last for first, last in hosts):
                return position
            entries = self.deny_source if source else self.deny_destination
            for first, _last in hosts:
                entries.setdefault(first, position)
        return len(rules)

    def _take_exact(self, lead: int, own: Sequence["_Fitted"]) -> list[int]:
        rest = []
        shaped: list[tuple[_Fields, int]] = []
        for position in range(lead, len(own)):
            shape = own[position].shape
            if shape is None:
                rest.append(position)
            else:
                shaped.append((shape, position))
        common = Counter(shape for shape, _ in shaped).most_common(SHAPES_MAX)
        hashes: dict[_Fields, dict[tuple[int, ...], int]] = {
            shape: {} for shape, count in common if count >= SHAPE_MIN
        }
        for shape, position in shaped:
            entries = hashes.get(shape)
            if entries is None:
                rest.append(position)
                continue
            for key in own[position].keys:
                entries.setdefault(key, position)
        self.shapes = list(hashes.items())
        return sorted(rest)


class Table:
    """All rules, compiled. `rules` is in the order in which they are looked at; what find returns indexes it."""

    def __init__(
        self,
        rules: Iterable[Rule] = (),
        *,
        default_out: Action = Action.ALLOW,
        default_in: Action = Action.DENY,
        previous: "Table | None" = None,
    ) -> None:
        """With `previous` the work is that of the rules which are not in it, as the same objects."""
        self.generation = next(_generations)
        self.rules = tuple(sorted(rules, key=attrgetter("priority")))
        self.default_out = default_out
        self.default_in = default_in
        known = {} if previous is None else previous._prepared
        prepared = [known.get(id(rule)) or _Prepared(rule) for rule in self.rules]
        self._prepared: dict[int, _Prepared] = {id(one.rule): one for one in prepared}
        members: list[list[_Prepared]] = [[] for _ in _PLANES]
        numbers: list[list[int]] = [[] for _ in _PLANES]
        for number, one in enumerate(prepared):
            for index in one.planes:
                members[index].append(one)
                numbers[index].append(number)
        made = [] if previous is None else [(key[1], plane) for key, plane in previous._planes.items()]
        self._planes: dict[_Key, Plane] = {}
        for index, key in enumerate(_PLANES):
            own = members[index]
            same = next(
                (plane for version, plane in made if version == key[1] and plane.prepared == own), None
            )
            if same is None:
                plane = Plane(
                    own, numbers[index], key[1], None if previous is None else previous._planes[key]
                )
                made.append((key[1], plane))
            else:  # as before, or as for the other direction
                plane = same.renumbered(numbers[index])
            self._planes[key] = plane
        self.out4 = self._planes[Direction.OUT, 4, False]
        self.out6 = self._planes[Direction.OUT, 6, False]
        self.in4 = self._planes[Direction.IN, 4, False]
        self.in6 = self._planes[Direction.IN, 6, False]
        self.has_audit = any(rule.audit_only for rule in self.rules)

    def plane(self, *, outgoing: bool, version: int, audit: bool = False) -> Plane:
        """The plane for a direction and IP version; that of the audit-only rules on demand."""
        if not audit:
            if outgoing:
                return self.out4 if version == 4 else self.out6
            return self.in4 if version == 4 else self.in6
        return self._planes[Direction.OUT if outgoing else Direction.IN, version, True]

    def action(self, number: int, *, outgoing: bool) -> Action:
        """Returns the action of the rule of that number; for NO_RULE the default."""
        if number >= 0:
            return self.rules[number].action
        return self.default_out if outgoing else self.default_in


class _Fitted(NamedTuple):
    """A rule for one IP version: the ranges of its fields, and its shape and exact keys, if it has some."""

    ranges: tuple[list[_Range] | None, ...]
    shape: _Fields | None
    keys: list[tuple[int, ...]]


class _Prepared:
    """A rule as the planes need it, and the planes that have it. Equal only to itself."""

    __slots__ = ("by_version", "planes", "rule")

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        versions = rule.versions()
        self.by_version: dict[int, _Fitted] = {}
        for version in versions:
            ranges = _field_ranges(rule, version, 32 if version == 4 else 128)
            shape = _shape(ranges)
            values = [[first for first, _ in one] if one else [0] for one in ranges]
            keys = [] if shape is None else list(itertools.product(*values))
            self.by_version[version] = _Fitted(ranges, shape, keys)
        self.planes = [
            index
            for index, (direction, version, audit) in enumerate(_PLANES)
            if rule.direction in (None, direction) and version in versions and rule.audit_only is audit
        ]


def _field_ranges(rule: Rule, version: int, bits: int) -> tuple[list[_Range] | None, ...]:
    # One list of disjoint ranges for each field, None for any.
    def addresses(networks: Iterable[object]) -> list[_Range] | None:
        own = [one for one in networks if getattr(one, "version", 0) == version]
        found = []
        for one in own:
            first = int(one.network_address)  # type: ignore[attr-defined]
            found.append((first, first | ((1 << (bits - one.prefixlen)) - 1)))  # type: ignore[attr-defined]
        return _merged(found) if found else None

    return (
        _protocols(rule),
        addresses(rule.source),
        addresses(rule.destination),
        _merged(list(rule.source_ports)) or None,
        _merged(list(rule.destination_ports)) or None,
    )


def _protocols(rule: Rule) -> list[_Range] | None:
    if rule.protocol is None:
        return None
    if rule.protocol != PORTLESS:
        return [(rule.protocol, rule.protocol)]
    return _merged([(number, number) for number in range(256) if number not in WITH_PORTS])


def _merged(ranges: list[_Range]) -> list[_Range]:
    merged: list[_Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def _shape(fields: Sequence[list[_Range] | None]) -> _Fields | None:
    # Which fields are single values, for a rule that has no other; None when it has ranges, or nothing at
    # all.
    count = 1
    for one in fields:
        if one is not None:
            if any(first != last for first, last in one):
                return None
            count *= len(one)
    if count > EXPAND_MAX or all(one is None for one in fields):
        return None
    protocol, source, destination, source_port, destination_port = (int(one is not None) for one in fields)
    return protocol, source, destination, source_port, destination_port


def _intervals(column: Sequence[list[_Range] | None], limit: int) -> tuple[list[int], list[int]]:
    # Bounds of the intervals (the first is 0) and for each the set of rules that hold in it.
    changes: dict[int, int] = {0: 0}
    always = (1 << len(column)) - 1
    for bit, ranges in enumerate(column):
        if ranges is None:
            continue
        own = 1 << bit
        always ^= own
        for first, last in ranges:
            changes[first] = changes.get(first, 0) ^ own
            if last + 1 < limit:
                changes[last + 1] = changes.get(last + 1, 0) ^ own
    changes[0] ^= always
    bounds = sorted(changes)
    masks = list(
        itertools.accumulate((changes[bound] for bound in bounds), lambda mask, change: mask ^ change)
    )
    return bounds, masks


def _spread(bounds: list[int], masks: list[int]) -> list[int]:
    return [masks[bisect_right(bounds, value) - 1] for value in range(256)]

"""Flows that were let through, in memory that outlives the process which judges: a reply finds its flow after it died.

An entry is written when a flow begins and when it has lived on for a while; the deadline, which makes it count, is
written last and taken away first, so an entry that was cut short is none. What is read back is only a hint: the
present table is asked again before a reply passes (`rayos_net.firewall.flow`).

Invariant: at most as many flows as there is room for; a new one takes a free place, or that of the longest unwritten.
"""

import struct
from collections.abc import Iterator
from typing import Final

from rayos_net.firewall.rule import PORT_MAX

FLOWS: Final = 2048
_KEY: Final = struct.Struct("<H?xHH16s16s")  # version and protocol, outgoing, ports, addresses
_DEADLINE: Final = struct.Struct("<d")  # 0: none
ENTRY_BYTES: Final = _DEADLINE.size + _KEY.size
MEMORY_BYTES: Final = FLOWS * ENTRY_BYTES
_ADDRESS_BYTES: Final = 16

_Key = tuple[int, int, int, int, int]


class FlowMemory:
    """Entries in `page`, of MEMORY_BYTES; perhaps a predecessor's."""

    def __init__(self, page: memoryview) -> None:
        self._page = page
        self._count = len(page) // ENTRY_BYTES
        self._places: dict[tuple[bool, _Key], int] = {}  # in the order in which they were written
        self._free: list[int] = []

    def recall(self, now: float, lifetime_max: float) -> Iterator[tuple[bool, _Key, float]]:
        """The direction, key and deadline of each flow that lives. Call it once, before the first `keep`."""
        found = []
        for place in range(self._count):
            at = place * ENTRY_BYTES
            deadline = _DEADLINE.unpack_from(self._page, at)[0]
            if not now < deadline <= now + lifetime_max:
                self._free.append(place)
                continue
            kind, outgoing, source_port, port, source, destination = _KEY.unpack_from(
                self._page, at + _DEADLINE.size
            )
            key = kind, int.from_bytes(source, "big"), int.from_bytes(destination, "big"), source_port, port
            found.append((deadline, place, outgoing, key))
        for deadline, place, outgoing, key in sorted(found):
            if key[0] >> 8 not in (4, 6) or (outgoing, key) in self._places:
                self._free.append(place)
                continue
            self._places[outgoing, key] = place
            yield outgoing, key, deadline

    def keep(self, outgoing: bool, key: _Key, deadline: float) -> None:
        """This flow is let through until `deadline`."""
        place = self._places.pop((outgoing, key), None)
        if place is None:
            place = self._free.pop() if self._free else self._places.pop(next(iter(self._places)))
        self._places[outgoing, key] = place
        at = place * ENTRY_BYTES
        kind, source, destination, source_port, port = key
        _DEADLINE.pack_into(self._page, at, 0.0)
        _KEY.pack_into(
            self._page,
            at + _DEADLINE.size,
            kind,
            outgoing,
            source_port & PORT_MAX,
            port & PORT_MAX,
            source.to_bytes(_ADDRESS_BYTES, "big"),
            destination.to_bytes(_ADDRESS_BYTES, "big"),
        )
        _DEADLINE.pack_into(self._page, at, deadline)

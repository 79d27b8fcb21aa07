"""The four input devices: what each tells of itself and what may be injected into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from rayos_devices.errors import RequestError
from rayos_devices.input.codes import Button, Key
from rayos_devices.input.wire import (
    ABS_INFO,
    BUS_VIRTUAL,
    DEVICE_IDS,
    PAYLOAD_BYTES,
    SYN_REPORT,
    Abs,
    EventType,
    Led,
    Property,
    Rel,
    Rep,
    Select,
    pack_bits,
)

#: An axis from 0 to this covers the screen, whatever its size.
ABS_MAX: Final = 32767
SLOTS: Final = 10

Event = tuple[int, int, int]

_INT32 = range(-(1 << 31), 1 << 31)
_REPEATABLE = range(3)


@dataclass(frozen=True, slots=True)
class Kind:
    """`bits` by event type; `ranges` by absolute axis: the values that may be injected."""

    name: str
    product: int
    bits: Mapping[EventType, frozenset[int]]
    ranges: Mapping[int, range] = field(default_factory=dict)
    properties: frozenset[int] = frozenset()

    def check(self, event: Sequence[int]) -> Event:
        """The event as a tuple. Errors: RequestError for one that this device cannot make."""
        if len(event) != 3:
            raise RequestError(f"an event of {len(event)} numbers: type, code and value are needed")
        kind, code, value = event
        if kind == EventType.SYN:
            if (code, value) != (SYN_REPORT, 0):
                raise RequestError(f"SYN event {code} with value {value}: only SYN_REPORT is allowed")
            return EventType.SYN, SYN_REPORT, 0
        if kind not in (EventType.KEY, EventType.REL, EventType.ABS) or kind not in self.bits:
            allowed = ", ".join(f"{t.value} ({t.name})" for t in (*self._injected, EventType.SYN))
            raise RequestError(f"event type {kind} for a {self.name}: allowed are {allowed}")
        if code not in self.bits[EventType(kind)]:
            raise RequestError(f"a {self.name} has no {EventType(kind).name} code {code}")
        values = _REPEATABLE if kind == EventType.KEY else _INT32
        values = self.ranges.get(code, values) if kind == EventType.ABS else values
        if value not in values:
            raise RequestError(
                f"value {value} of {EventType(kind).name} code {code}: {values.start} to {values.stop - 1} are allowed"
            )
        return kind, code, value

    @property
    def _injected(self) -> list[EventType]:
        return [t for t in (EventType.KEY, EventType.REL, EventType.ABS) if t in self.bits]

    def config(self, select: int, subsel: int, serial: str) -> bytes:
        """Returns the configuration space of a selection (VIRTIO 1.3, 5.8.5); empty for a selection that is not
        there.
        """
        if select == Select.EV_BITS:
            kinds = {t.value: codes for t, codes in self.bits.items()}
            return pack_bits(kinds.get(subsel, frozenset()))
        if select == Select.ABS_INFO:
            values = self.ranges.get(subsel)
            return ABS_INFO.pack(max(0, values.start), values.stop - 1, 0, 0, 0) if values else b""
        if subsel:
            return b""
        if select == Select.ID_NAME:
            return f"RayOS {self.name}".encode()
        if select == Select.ID_SERIAL:
            return serial.encode()[:PAYLOAD_BYTES]
        if select == Select.ID_DEVIDS:
            return DEVICE_IDS.pack(BUS_VIRTUAL, 0x0627, self.product, 1)
        if select == Select.PROP_BITS:
            return pack_bits(self.properties)
        return b""


_POINTER_BUTTONS = frozenset(
    (Button.BTN_LEFT, Button.BTN_RIGHT, Button.BTN_MIDDLE, Button.BTN_SIDE, Button.BTN_EXTRA)
)
_SCREEN = range(ABS_MAX + 1)

KINDS: Final[Mapping[str, Kind]] = {
    kind.name: kind
    for kind in (
        Kind(
            "keyboard",
            1,
            {EventType.KEY: frozenset(Key), EventType.LED: frozenset(Led), EventType.REP: frozenset(Rep)},
        ),
        Kind(
            "mouse",
            2,
            {EventType.KEY: _POINTER_BUTTONS, EventType.REL: frozenset(Rel)},
            properties=frozenset((Property.POINTER,)),
        ),
        Kind(
            "tablet",
            3,
            {
                EventType.KEY: _POINTER_BUTTONS,
                EventType.REL: frozenset((Rel.WHEEL, Rel.HWHEEL)),
                EventType.ABS: frozenset((Abs.X, Abs.Y)),
            },
            {Abs.X: _SCREEN, Abs.Y: _SCREEN},
            frozenset((Property.POINTER,)),
        ),
        Kind(
            "touch",
            4,
            {EventType.KEY: frozenset((Button.BTN_TOUCH,)), EventType.ABS: frozenset(Abs)},
            {
                Abs.X: _SCREEN,
                Abs.Y: _SCREEN,
                Abs.MT_SLOT: range(SLOTS),
                Abs.MT_POSITION_X: _SCREEN,
                Abs.MT_POSITION_Y: _SCREEN,
                Abs.MT_TRACKING_ID: range(-1, 0x10000),
            },
            frozenset((Property.DIRECT,)),
        ),
    )
}

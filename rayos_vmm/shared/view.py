"""Devices as their worker tells of them, in the worker's own words."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from rayos_devices.faults import Fault


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is told."""


class PortState(View, frozen=True):
    """A console port: whether a program has it open, and its size in characters (0: none was told)."""

    port: int
    name: str
    is_console: bool
    guest_open: bool
    columns: int
    rows: int


class Size(View, frozen=True):
    """Pixels."""

    width: int
    height: int


class Position(View, frozen=True):
    """Pixels from the upper left corner."""

    x: int
    y: int


class Scanout(View, frozen=True):
    """A monitor: its preferred mode, the picture that the guest shows, where its cursor is."""

    scanout: int
    mode: Size
    is_on: bool
    picture: Size
    cursor: Position | None


class DisplayInfo(View, frozen=True):
    """The serial of the newest damage, and the monitors."""

    serial: int
    scanouts: list[Scanout]


class FaultState(View, frozen=True):
    """A fault (`rayos_devices.faults.Fault`), how often it matched, and how often it was done."""

    op: str
    action: str
    sector: int | None
    sectors: int
    nth: int
    every: int
    probability: float
    count: int
    delay_s: float
    matched: int
    done: int

    @property
    def conditions(self) -> dict[str, float]:
        """The fields that narrow when it strikes, and their values."""
        plain = Fault(op=self.op, action=self.action, delay_s=1.0 if self.action == "delay" else 0.0)
        named = {
            name: getattr(self, name)
            for name in ("sector", "sectors", "nth", "every", "probability", "count")
        }
        found = {name: value for name, value in named.items() if value != getattr(plain, name)}
        return found | ({"delay_s": self.delay_s} if self.delay_s else {})


class Verdict(View, frozen=True):
    """A packet's verdict: what, why, by which rule, from where. `number`, `direction`, `packet`: of a trace alone."""

    action: str
    reason: str
    rule: str
    origin: str
    layer: str
    audit_rule: str
    number: int | UnsetType = UNSET
    direction: str | UnsetType = UNSET
    packet: str | UnsetType = UNSET

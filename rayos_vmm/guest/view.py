"""Devices of a running guest as callers see them: consoles, monitors, input, faults, figures.

Figures and states are what the worker says of its devices; `msgspec.convert` makes these of it, so that a worker that
was taken over cannot put anything else into an answer.
"""

from __future__ import annotations

import msgspec

from rayos_devices.account import Account
from rayos_vmm.shared.view import PortState, View


class ConsolePort(PortState, frozen=True):
    """A console port, its writer, and how many watch."""

    writer: str | None
    watchers: int


class InputDevice(View, frozen=True):
    """An input device: its lights, the keys held down, events that wait for the guest, events dropped."""

    device: str
    kind: str
    leds: list[str]
    held: list[str]
    waiting_events: int
    queue_limit: int
    dropped: int


class OperationFigures(View, frozen=True):
    """One kind of operation of a device: how many, how many bytes, and percentiles of its time in nanoseconds."""

    allowed: int
    denied: int
    bytes: int
    latency_ns: dict[str, int]


class DeviceView(View, frozen=True):
    """A device: what it did by operation, denials by reason, how much waits before it, its limits."""

    vm: str
    device: str
    operations: dict[str, OperationFigures]
    denials: dict[str, int]
    depth: int
    limits: dict[str, int]

    @classmethod
    def of(cls, vm: str, device: str, account: Account, limits: dict[str, int]) -> DeviceView:
        """The figures of an account as they are now."""
        figures = {"vm": vm, "device": device, "limits": limits, **account.snapshot()}
        return msgspec.convert(figures, cls)


class KeptOperation(View, frozen=True):
    """One of the last operations: when (nanoseconds, CLOCK_MONOTONIC), its outcome, bytes and duration."""

    number: int
    at_ns: int
    operation: str
    outcome: str
    bytes: int
    duration_ns: int


class DeviceDetail(DeviceView, frozen=True):
    """A device, the percentiles of each stage of its operations, and its last operations, oldest first."""

    profile: dict[str, dict[str, dict[str, int]]]
    last: list[KeptOperation]


class Sample(View, frozen=True):
    """One second of a worker: the totals so far, its processor time, and how much waited."""

    number: int
    at_ns: int
    operations: int
    bytes: int
    denials: int
    cpu_ns: int
    depth: int


class Metrics(View, frozen=True):
    """The level of optimization, and the last samples, oldest first."""

    level: int
    samples: list[Sample]


class MachineFigures(View, frozen=True):
    """A running machine: its level, its last two samples, its devices."""

    vm: str
    level: int
    metrics: list[Sample]
    devices: list[DeviceView]

"""Limits in words, rates between two looks, and what a level changes."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec
import pytest

from rayos_vmm.cli.device import wanted_limits
from rayos_vmm.cli.optimize import effects
from rayos_vmm.cli.top import rates
from rayos_vmm.errors import Invalid
from rayos_vmm.guest.accounts import spell
from rayos_vmm.guest.view import MachineFigures


def ask(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**dict.fromkeys(("rate", "iops", "storage", "memory", "queue")) | given)


def test_limits_have_their_unit() -> None:
    """Bits for a network card, bytes for the rest; 0 is unbounded."""
    assert wanted_limits(ask(rate="10Mbit/s")) == {"rate": 1_250_000}
    assert wanted_limits(ask(rate="5MiB/s", iops=100, storage="2GiB", queue=32)) == {
        "rate": 5 << 20,
        "iops": 100,
        "storage": 2 << 30,
        "queue": 32,
    }
    assert wanted_limits(ask(rate="0", iops=0)) == {"rate": 0, "iops": 0}
    for text in ("10", "7bit/s", "10MiB", "fast"):
        with pytest.raises(Invalid):
            wanted_limits(ask(rate=text))


def test_limits_are_spelled_as_they_are_asked_for() -> None:
    """A limit as shown can be given back."""
    assert spell("rate", 1_250_000, "net") == "10Mbit/s"
    assert spell("rate", 5 << 20, "disk0") == "5MiB/s"
    assert spell("storage", 10 << 30, "disk0") == "10GiB"
    assert spell("iops", 100, "disk0") == "100"
    assert spell("iops", 0, "disk0") == "unbounded"


def machine(allowed: int, cpu: int = 0) -> MachineFigures:
    operations = {
        "disk.read": {
            "allowed": allowed,
            "denied": 2,
            "bytes": 4096 * allowed,
            "latency_ns": {"p50": 1024, "p99": 2048, "max": 4096},
        }
    }
    device = {
        "vm": "dev",
        "device": "disk0",
        "operations": operations,
        "depth": 3,
        "denials": {},
        "limits": {},
    }
    plain = {"number": 1, "operations": 0, "bytes": 0, "denials": 0, "depth": 0}
    samples = [{**plain, "at_ns": 0, "cpu_ns": 0}, {**plain, "at_ns": 1_000_000_000, "cpu_ns": cpu}]
    figures = {"vm": "dev", "level": 0, "metrics": samples, "devices": [device]}
    return msgspec.convert(figures, MachineFigures)


def test_rates_are_differences() -> None:
    """A machine that was started again counts from nothing, and is not shown going backwards."""
    (one,) = rates([machine(100)], [machine(300, 250_000_000)], 2.0)
    assert one.operations_per_second == 100
    assert one.bytes_per_second == 409600
    assert one.denied_per_second == 0
    assert (one.depth, one.p50_ns, one.worker_cpu) == (3, 1024, 0.25)
    (one,) = rates([machine(100)], [machine(50)], 1.0)
    assert one.operations_per_second == 50
    (one,) = rates([], [machine(7)], 1.0)
    assert one.operations_per_second == 7


def test_effects_of_a_level_are_sums_over_queues() -> None:
    """Verdicts are told where there is a firewall."""
    queue = {"requests": 5, "kicks": 3, "calls": 2}
    stats = {
        "net": {"queues": [queue, queue], "firewall": {"cache": {"remembered": 9, "asked": 1, "offload": 0}}},
        "disk0": {"queues": [queue]},
    }
    assert effects(stats) == [
        {"device": "net", "requests": 10, "kicks": 6, "calls": 4, "remembered": 9, "asked": 1},
        {"device": "disk0", "requests": 5, "kicks": 3, "calls": 2},
    ]

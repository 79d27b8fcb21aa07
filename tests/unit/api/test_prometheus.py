"""Figures for everybody on this host, and for nobody else."""

from __future__ import annotations

import pytest

from rayos_devices.gate import Op
from rayos_devices.stats import Stats
from rayos_vmm.api.prometheus import parse_address
from rayos_vmm.errors import Invalid
from rayos_vmm.service.metrics import latency


def test_only_this_host_is_listened_to() -> None:
    """An address of the network would give the figures to everybody."""
    assert parse_address("127.0.0.1:9100") == ("127.0.0.1", 9100)
    assert parse_address("[::1]:0") == ("::1", 0)
    for text in (
        "0.0.0.0:9100",
        "192.0.2.1:80",
        "9100",
        "localhost:9100",
        "127.0.0.1:70000",
        "127.0.0.1",
        ":1",
    ):
        with pytest.raises(Invalid, match="loopback"):
            parse_address(text)


def test_latencies_are_cumulated_in_seconds() -> None:
    """Each bucket holds those below it; the last all."""
    stats = Stats(Op.DISK_READ)
    for taken in (100, 5_000, 5_000, 10_000_000):
        stats.sample(Op.DISK_READ.index, taken, 0, 1)
    buckets, total = latency(stats.account, Op.DISK_READ)
    assert [count for _, count in buckets] == sorted(count for _, count in buckets)
    assert buckets[0] == ("1.28e-07", 1.0)
    assert buckets[-1] == ("+Inf", 4.0)
    assert dict(buckets)["8.192e-06"] == 3.0
    assert 0.005 < total < 0.02

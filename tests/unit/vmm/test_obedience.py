"""What a worker takes from the gate page: rates at once when it starts or is told, use once a second in sums."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any

import pytest

from devices.blk.backend import BlkBackend
from devices.blk.store import RawStore
from devices.gate import Gate, Op
from devices.loop import Loop
from devices.net.backend import NetBackend
from devices.net.port import TapPort
from rayos_vmm.worker.obedience import AUDITED, DISK_RATE, NET_RATE, Obedience


@pytest.fixture
def disk(tmp_path: Path) -> RawStore:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return RawStore(os.open(path, os.O_RDWR), read_only=False)


def test_rates_and_use(disk: RawStore) -> None:
    loop = Loop()
    left, right = os.pipe()
    words = memoryview(array("Q", [2**64 - 1, 7, 0, 0, 0]))
    gate = Gate(words.cast("B"))
    card = NetBackend("net", loop, TapPort(left), rate_bytes_per_second=1e6, gate=gate)
    drive = BlkBackend("disk0", loop, disk, gate=gate)
    told: list[dict[str, Any]] = []
    words[DISK_RATE] = 5000
    obedience = Obedience(loop, [card, drive], gate, told.append)
    assert drive.snapshot()["quota"]["bytes_per_second"] == 5000
    words[NET_RATE], words[1] = 20_000, 8
    assert obedience.apply() == 8 and card.snapshot()["quota"]["rate_bytes_per_second"] == 20_000
    words[NET_RATE] = 10**9  # never above the quota
    obedience.apply()
    assert card.snapshot()["quota"]["rate_bytes_per_second"] == 1e6
    words[NET_RATE] = words[DISK_RATE] = 0
    obedience.apply()
    assert drive.snapshot()["quota"]["bytes_per_second"] == 0

    drive.stats.allow(Op.DISK_READ, 10)
    words[AUDITED] = 1 << Op.DISK_READ.index | 1 << Op.NET_TX.index
    obedience.apply()
    drive.stats.allow(Op.DISK_READ, 10)
    drive.stats.allow(Op.DISK_WRITE, 10)
    obedience.look()
    assert told == [{"event": "used", "device": "disk0", "operations": {"disk.read": 1}}]
    obedience.look()
    assert len(told) == 1
    assert Obedience(loop, [drive], Gate(), told.append).apply() == 0
    for backend in (card, drive):
        backend.close()
    os.close(right)

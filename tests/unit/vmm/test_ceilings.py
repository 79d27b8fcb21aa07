"""A worker takes rates from the gate page at once when it starts or is told, and reports use once a second in sums."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any

import pytest

from rayos_devices.blk.backend import BlkBackend
from rayos_devices.blk.store import RawStore
from rayos_devices.gate import Gate, Op
from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.input.backend import InputBackend
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.port import TapPort
from rayos_vmm.shared.gate import AUDITED, DISK_RATE, DISK_SIZE, GPU_MEMORY, INPUT_QUEUE, NET_RATE
from rayos_vmm.worker.ceilings import Ceilings


@pytest.fixture
def disk(tmp_path: Path) -> RawStore:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return RawStore(os.open(path, os.O_RDWR), read_only=False)


def test_rates_and_use(disk: RawStore) -> None:
    loop = Loop()
    left, right = os.pipe()
    words = memoryview(array("Q", [2**64 - 1, 7, *[0] * 7]))
    gate = Gate(words.cast("B"))
    card = NetBackend("net", loop, TapPort(left), rate_bytes_per_second=1e6, gate=gate)
    drive = BlkBackend("disk0", loop, disk, gate=gate)
    told: list[dict[str, Any]] = []
    words[DISK_RATE] = 5000
    ceilings = Ceilings(loop, [card, drive], gate, told.append)
    assert drive.snapshot()["quota"]["bytes_per_second"] == 5000
    words[NET_RATE], words[1] = 20_000, 8
    assert ceilings.apply() == 8 and card.snapshot()["quota"]["rate_bytes_per_second"] == 20_000
    words[NET_RATE] = 10**9  # never above the quota
    ceilings.apply()
    assert card.snapshot()["quota"]["rate_bytes_per_second"] == 1e6
    words[NET_RATE] = words[DISK_RATE] = 0
    ceilings.apply()
    assert drive.snapshot()["quota"]["bytes_per_second"] == 0

    drive.stats.allow(Op.DISK_READ, 10)
    words[AUDITED] = 1 << Op.DISK_READ.index | 1 << Op.NET_TX.index
    ceilings.apply()
    drive.stats.allow(Op.DISK_READ, 10)
    drive.stats.allow(Op.DISK_WRITE, 10)
    ceilings.report()
    assert told == [{"event": "used", "device": "disk0", "operations": {"disk.read": 1}}]
    ceilings.report()
    assert len(told) == 1
    assert Ceilings(loop, [drive], Gate(), told.append).apply() == 0
    for backend in (card, drive):
        backend.close()
    os.close(right)


def test_ceilings_come_and_go(disk: RawStore) -> None:
    """Storage, GPU memory and input queue: never above what the page says, and what was set when it says nothing."""
    loop = Loop()
    words = memoryview(array("Q", [2**64 - 1, 7, *[0] * 7]))
    gate = Gate(words.cast("B"))
    drive = BlkBackend("disk0", loop, disk, gate=gate)
    gpu = GpuBackend("gpu", loop, quota_bytes=1 << 20, gate=gate)
    keyboard = InputBackend("keyboard", loop, "keyboard", queue_limit=64, gate=gate)
    words[DISK_SIZE], words[GPU_MEMORY], words[INPUT_QUEUE] = 4096, 1 << 16, 16
    ceilings = Ceilings(loop, [drive, gpu, keyboard], gate, lambda _: None)

    def found() -> tuple[int, int, int]:
        return drive.limit(Limit.STORAGE), gpu.limit(Limit.MEMORY), keyboard.limit(Limit.QUEUE)

    assert found() == (4096, 1 << 16, 16)
    keyboard.change_limit(Limit.QUEUE, 100)  # asked for, and above the ceiling for now
    gpu.change_limit(Limit.MEMORY, 1 << 13)
    assert found() == (4096, 1 << 13, 16)
    words[DISK_SIZE], words[GPU_MEMORY], words[INPUT_QUEUE] = 1, 1, 1  # as little as each device can have
    ceilings.apply()
    assert found() == (1, 4096, 8)
    words[DISK_SIZE], words[GPU_MEMORY], words[INPUT_QUEUE] = 0, 0, 0
    ceilings.apply()
    assert found() == (0, 1 << 13, 100)
    for backend in (drive, gpu, keyboard):
        backend.close()
    loop.close()

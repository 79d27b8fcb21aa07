"""A reader sees a device's counters exactly, also while they are written, and behind a successor."""

from __future__ import annotations

import struct
from array import array
from itertools import pairwise

import pytest

from rayos_devices.account import (
    ACCOUNT_BYTES,
    LAYOUT,
    NEXT,
    OPERATIONS,
    PROFILED,
    SLOT_BASE,
    SLOT_WORDS,
    Account,
)
from rayos_devices.console.backend import ConsoleBackend
from rayos_devices.console.port import PortSpec
from rayos_devices.errors import RequestError
from rayos_devices.gate import Denial, Gate, Op
from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.gpu.heap import PAGE_BYTES, Heap
from rayos_devices.input.backend import InputBackend
from rayos_devices.levels import Level
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.metrics import METRICS_WORDS, SAMPLES, MetricsRing, read_samples
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.port import SinkPort
from rayos_devices.stats import Stats


def test_every_denial_is_kept_with_its_reason_size_and_time() -> None:
    """The reasons are a closed list, each counted."""
    stats = Stats(Op.DISK_WRITE, Op.DISK_READ)
    for size, reason in enumerate(Denial):
        stats.deny(Op.DISK_WRITE, reason, size)
    assert stats.account.denials() == {reason.value: 1 for reason in Denial}
    kept = stats.account.operations()
    assert [(one.denial, one.size_bytes, one.op) for one in kept] == [
        (reason, size, Op.DISK_WRITE) for size, reason in enumerate(Denial)
    ]
    assert all(before.at_ns <= after.at_ns for before, after in pairwise(kept))
    assert stats.account.counted(Op.DISK_WRITE) == (0, len(Denial), 0)


def test_what_gpu_input_and_console_do_is_timed() -> None:
    """Every operation of theirs is kept with its duration, refused ones too, and has its percentiles."""
    loop = Loop()
    gpu, keyboard = GpuBackend("gpu", loop), InputBackend("keyboard", loop, "keyboard")
    console = ConsoleBackend("console", loop, ports=[PortSpec("shell", is_console=True)])
    gpu.frame()
    press = [(1, 30, 1), (0, 0, 0), (1, 30, 0), (0, 0, 0)]
    for _ in range(20):
        keyboard.inject(press)
    with pytest.raises(RequestError):
        keyboard.inject([(1, 0xFFFF, 1)])
    console.write(0, b"in")
    console.feed(0, b"out")
    console.resize(0, 80, 25)
    gate = Gate(allowed=0)
    console.gate = gate
    with pytest.raises(RequestError):
        console.write(0, b"in")
    for backend, ops in (
        (gpu, {Op.GPU_READBACK}),
        (keyboard, {Op.INPUT_INJECT}),
        (console, {Op.CONSOLE_READ, Op.CONSOLE_WRITE, Op.CONSOLE_RESIZE}),
    ):
        account = backend.stats.account
        kept = account.operations()
        assert {one.op for one in kept} == ops
        assert all(one.duration_ns > 0 and one.at_ns > one.duration_ns for one in kept)
        for op in ops:
            assert sum(account.buckets(op)) == account.counted(op)[0]
            assert 0 < account.percentile(op, 0.5) <= account.percentile(op, 0.99)
        backend.close()
    reasons = {one.denial for one in keyboard.stats.account.operations()}
    assert reasons == {None, Denial.INVALID, Denial.QUEUE_FULL}


def test_the_last_256_operations_are_kept() -> None:
    """The ring goes round; numbers tell how many there were."""
    stats = Stats(Op.NET_TX)
    for size in range(OPERATIONS + 10):
        stats.count(Op.NET_TX.index, size)
        stats.sample(Op.NET_TX.index, 1000 + size, size, size)
    kept = stats.account.operations()
    assert [one.number for one in kept] == list(range(11, OPERATIONS + 11))
    assert kept[-1].describe() == {
        "number": OPERATIONS + 10,
        "at_ns": OPERATIONS + 9,
        "operation": "net.tx",
        "outcome": "done",
        "bytes": OPERATIONS + 9,
        "duration_ns": 1000 + OPERATIONS + 9,
    }
    assert stats.account.counted(Op.NET_TX)[0] == OPERATIONS + 10


def test_an_entry_that_is_being_written_is_left_out() -> None:
    """Its number is 0 meanwhile; what a worker that died left so is left out for ever."""
    stats = Stats(Op.NET_TX)
    for size in range(3):
        stats.allow(Op.NET_TX, size)
    stats.words[SLOT_BASE + SLOT_WORDS] = 0
    assert [one.number for one in stats.account.operations()] == [1, 3]


def test_what_a_worker_writes_is_not_believed() -> None:
    """Numbers, operations and reasons that cannot be are left out, and a name is made printable."""
    words = array("Q", bytes(ACCOUNT_BYTES))
    for index in range(len(words)):
        words[index] = 0xFFFF_FFFF_FFFF_FFFF
    account = Account(memoryview(words))
    assert account.operations() == []
    assert not account.is_known
    assert account.name.isprintable()
    account.snapshot()
    assert account.profile(Op.NET_RX)["samples"]["kept"] == PROFILED
    with pytest.raises(ValueError, match="account of 3 words"):
        Account(memoryview(words)[:3])


def test_stages_have_percentiles_of_their_own() -> None:
    """Of the last samples, whatever there was before."""
    stats = Stats(Op.DISK_READ)
    assert stats.account.profile(Op.DISK_READ) == {}
    for count in range(PROFILED + 100):
        stats.profile(Op.DISK_READ.index, 10, 20 + count % 2, 0, 1 << 40)
    profile = stats.account.profile(Op.DISK_READ)
    assert profile["samples"] == {"kept": PROFILED, "ever": PROFILED + 100}
    assert profile["capability"] == {"p50": 10, "p90": 10, "p99": 10, "max": 10}
    assert (profile["quota"]["p50"], profile["quota"]["max"]) == (21, 21)
    assert profile["firewall"]["max"] == 0
    assert profile["perform"]["max"] == 0xFFFF_FFFF


def test_a_successor_counts_on_and_another_layout_starts_over() -> None:
    """The account is the device's, not the worker's."""
    page = memoryview(bytearray(ACCOUNT_BYTES))
    first = Stats(Op.NET_TX, Op.NET_RX)
    first.move(page, "net")
    first.allow(Op.NET_TX, 100)
    second = Stats(Op.NET_TX, Op.NET_RX)
    second.move(page, "net")
    second.allow(Op.NET_TX, 11)
    account = Account(page.cast("Q"))
    assert account.counted(Op.NET_TX) == (2, 0, 111)
    assert (account.name, account.ops) == ("net", (Op.NET_TX, Op.NET_RX))
    struct.pack_into("<Q", page, 0, LAYOUT + 1)
    Stats(Op.NET_TX).move(page, "net")
    assert account.counted(Op.NET_TX) == (0, 0, 0)
    assert page.cast("Q")[NEXT] == 0


def test_a_successor_has_the_limits_that_were_set() -> None:
    """A changed limit is in the account before it is answered."""
    loop = Loop()
    page = memoryview(bytearray(ACCOUNT_BYTES))
    try:
        net = NetBackend("net", loop, SinkPort(), rate_bytes_per_second=12_500_000.0)
        net.use_account(page)
        net.change_limit(Limit.RATE, 125_000)
        assert net.snapshot()["limits"] == {"rate": 125_000}
        successor = NetBackend("net", loop, SinkPort(), rate_bytes_per_second=12_500_000.0)
        assert successor.limit(Limit.RATE) == 12_500_000
        successor.use_account(page)
        assert successor.limit(Limit.RATE) == 125_000
        successor.change_limit(Limit.RATE, 0)
        assert successor.rate_bytes_per_second is None
        with pytest.raises(RequestError, match="net has no limit memory: it has rate"):
            net.change_limit(Limit.MEMORY, 1)
    finally:
        loop.close()


def test_an_input_queue_can_be_made_shorter() -> None:
    """Waiting events stay; a press more finds no room."""
    loop = Loop()
    try:
        keyboard = InputBackend("keyboard", loop, "keyboard", queue_limit=64)
        for code in range(2, 12):
            keyboard.inject([(1, code, 1), (0, 0, 0), (1, code, 0), (0, 0, 0)])
        waiting = keyboard.depth
        keyboard.change_limit(Limit.QUEUE, 8)
        assert keyboard.depth == waiting
        assert keyboard.inject([(1, 30, 1)]) == 1
        assert keyboard.stats.account.denials() == {"queue_full": 1}
        with pytest.raises(RequestError, match="8 to 1024"):
            keyboard.change_limit(Limit.QUEUE, 7)
    finally:
        loop.close()


def test_gpu_memory_can_be_made_less_and_more_up_to_the_heap() -> None:
    """Memory in use stays; no more comes before enough was freed."""
    heap = Heap(None, 4 * PAGE_BYTES)
    first = heap.allocate(3 * PAGE_BYTES)
    assert first is not None
    heap.limit_bytes = 2 * PAGE_BYTES
    assert heap.allocate(1) is None
    heap.free(first, 3 * PAGE_BYTES)
    assert heap.allocate(2 * PAGE_BYTES) is not None
    assert heap.allocate(1) is None
    heap.limit_bytes = heap.size_bytes
    assert heap.allocate(1) is not None
    heap.close()


def test_level_0_samples_all_and_higher_ones_some() -> None:
    """The level is the devices' own; the rings read it at each operation."""
    loop = Loop()
    try:
        net = NetBackend("net", loop, SinkPort())
        net.set_level(Level.CHECKED)
        assert net.stats.sample_mask == 0
        net.set_level(Level.BATCHING)
        assert net.stats.sample_mask == 63
    finally:
        loop.close()


def test_metrics_are_read_in_place() -> None:
    """A ring of 512 samples; a torn one is left out."""
    words = memoryview(array("Q", bytes(8 * METRICS_WORDS)))
    ring = MetricsRing(words.cast("B"))
    assert read_samples(words) == []
    for number in range(SAMPLES + 3):
        ring.write(number, 2 * number, 3, 4, 5, 6)
    samples = read_samples(words)
    assert [one["number"] for one in samples] == list(range(4, SAMPLES + 4))
    assert samples[-1] == {
        "number": SAMPLES + 3,
        "at_ns": SAMPLES + 2,
        "operations": 2 * SAMPLES + 4,
        "bytes": 3,
        "denials": 4,
        "cpu_ns": 5,
        "depth": 6,
    }
    words[1 + 2 * 7] = 0
    assert len(read_samples(words, 2)) == 1

"""A hostile guest and the input devices: row I1, and rows V1 to V15 on the event queue."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from rayos_devices.input.backend import InputBackend
from rayos_devices.input.codes import Key
from rayos_devices.input.model import KINDS
from rayos_devices.input.wire import CONFIG_BYTES, EVENT, EVENT_QUEUE, STATUS_QUEUE, EventType
from rayos_devices.virtio.features import Feature
from rayos_vmm.shared.spec import Device
from tests.framework.controlled import Bounds, RealInput
from tests.framework.driver import DESC_F_NEXT, DESC_F_WRITE
from tests.framework.hostile import wait_for
from tests.framework.kept import Kept
from tests.framework.target import Rig, Stepped

SYN = (0, 0, 0)
PRESS = [(EventType.KEY, Key.KEY_A, 1), SYN, (EventType.KEY, Key.KEY_A, 0), SYN]
FREE = 40

Target = Stepped[InputBackend] | RealInput


@pytest.fixture(params=["keyboard", "mouse", "tablet", "touch"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """A sandboxed worker with one device of each kind, for all cases."""
    devices = [Device(kind="input", name=kind, input_kind=kind) for kind in KINDS]  # type: ignore[arg-type]
    with Kept(tmp_path_factory.mktemp("input"), devices) as kept:
        bounds = Bounds(kept, list(KINDS))
        yield kept
        bounds.check()


@pytest.fixture
def stepped(kind: str) -> Iterator[Stepped[InputBackend]]:
    """In this process, for what cannot be told from outside."""
    with Stepped(lambda loop: InputBackend("input", loop, kind)) as target:  # type: ignore[arg-type]
        yield target
        assert set(target.reasons) <= {"the frontend left"}


@pytest.fixture(params=["stepped", "served"])
def target(request: pytest.FixtureRequest, kind: str) -> Iterator[Target]:
    """A device in this process, or the real worker's."""
    if request.param == "stepped":
        yield request.getfixturevalue("stepped")
        return
    with RealInput(request.getfixturevalue("kept"), kind) as target:
        yield target


@pytest.fixture
def rig(target: Target) -> Iterator[Rig]:
    with Rig(target, 2, size=64) as rig:
        yield rig


def honest(rig: Rig, target: Target) -> None:
    """Events arrive, in their order, once."""
    events = (
        PRESS
        if target.backend.kind.name == "keyboard"
        else [(1, min(target.backend.kind.bits[EventType.KEY]), 1), SYN]
    )
    queue = rig.queues[EVENT_QUEUE]
    queue.collect()
    rooms = {}
    for _ in events:
        address = rig.ram.allocate(EVENT.size)
        rooms[queue.submit((), [(address, EVENT.size)])] = address
    target.backend.inject(events)
    got = [EVENT.unpack(rig.ram.read(rooms[head], size)) for head, size in rig.wait_used(0, len(events))]
    assert got == events
    assert rig.request(EVENT.pack(EventType.LED, 0, 1), index=STATUS_QUEUE) == b""


def inject(target: Target) -> None:
    code = min(target.backend.kind.bits[EventType.KEY])
    target.backend.inject([(EventType.KEY, code, 1), SYN, (EventType.KEY, code, 0), SYN])


# -- event queue -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 7])
def test_I1_buffers_too_small_for_an_event_come_back_empty(rig: Rig, target: Target, size: int) -> None:
    """Counted, and the events go into the next that fit."""
    queue = rig.queues[EVENT_QUEUE]
    for _ in range(5):
        queue.submit((), [(rig.ram.allocate(16), size)])
    inject(target)
    assert [written for _, written in rig.wait_used(0, 5)] == [0] * 5
    assert target.backend.queues[0].chain_errors == 5
    assert target.backend.snapshot()["waiting_events"] == 4
    queue.submit((), [(rig.ram.allocate(16), 8)])
    assert rig.wait_used(0, 1)[0][1] == 8


def test_I1_an_event_in_single_bytes(rig: Rig, target: Target) -> None:
    """Framing is the driver's (2.7.4.2)."""
    start = rig.ram.allocate(8)
    rig.queues[0].submit((), [(start + i, 1) for i in range(8)], indirect=True)
    inject(target)
    rig.wait_used(0, 1)
    kind, code, value = EVENT.unpack(rig.ram.read(start, 8))
    assert (kind, value) == (EventType.KEY, 1)
    assert code in target.backend.kind.bits[EventType.KEY]


@pytest.mark.parametrize("target", ["stepped"], indirect=True)
def test_I1_no_buffers_ever(rig: Rig, target: Target) -> None:
    """Ten thousand injections for a guest that does not look: bounded, counted, and the last word is a release."""
    code = min(target.backend.kind.bits[EventType.KEY])
    for _ in range(2500):
        inject(target)
    snapshot = target.backend.snapshot()
    assert snapshot["waiting_events"] <= snapshot["queue_limit"]
    assert snapshot["denials"]["queue_full"] > 2000
    queue, events = rig.queues[0], []
    while target.backend.snapshot()["waiting_events"]:
        address = rig.ram.allocate(EVENT.size)
        queue.submit((), [(address, EVENT.size)])
        rig.wait_used(0, 1)
        events.append(EVENT.unpack(rig.ram.read(address, EVENT.size)))
    assert [event for event in events if event[1] == code][-1][2] == 0
    honest(rig, target)


def test_I1_a_large_buffer_gets_one_event(rig: Rig, target: Target) -> None:
    room = rig.ram.put(b"\xaa" * 4096)
    rig.queues[0].submit((), [(room, 4096)])
    inject(target)
    assert rig.wait_used(0, 1)[0][1] == EVENT.size
    assert rig.ram.read(room + 8, 4088) == b"\xaa" * 4088


def test_I1_readable_buffers_on_the_event_queue(rig: Rig, target: Target) -> None:
    """Nothing is written into what the driver did not offer for writing."""
    room = rig.ram.put(b"\xaa" * 64)
    rig.queues[0].submit([(room, 64)])
    inject(target)
    assert rig.wait_used(0, 1)[0][1] == 0
    assert rig.ram.read(room, 64) == b"\xaa" * 64
    rig.queues[0].submit([(room, 8)], [(room + 32, 8)])
    assert rig.wait_used(0, 1)[0][1] == 8
    assert rig.ram.read(room, 32) == b"\xaa" * 32


# -- status queue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7])
def test_I1_short_status(rig: Rig, target: Target, size: int) -> None:
    rig.request(b"\xff" * size, index=STATUS_QUEUE)
    assert target.backend.queues[STATUS_QUEUE].chain_errors == 1
    assert target.backend.leds == 0
    honest(rig, target)


@pytest.mark.parametrize(
    "status",
    [
        pytest.param(struct.pack("<HHI", 0xFFFF, 0xFFFF, 0xFFFFFFFF), id="all-ones"),
        pytest.param(struct.pack("<HHI", 0x11, 0xFFFF, 1), id="led-65535"),
        pytest.param(struct.pack("<HHI", 0x11, 3, 1), id="led-that-is-not-there"),
        pytest.param(struct.pack("<HHI", 0x01, 30, 1), id="a-key-as-status"),
        pytest.param(struct.pack("<HHI", 0x14, 0, 0xFFFFFFFF), id="repeat"),
        pytest.param(struct.pack("<HHI", 0x12, 2, 1), id="a-bell"),
        pytest.param(bytes(4096), id="a-page"),
    ],
)
def test_I1_status_junk_changes_nothing(rig: Rig, target: Target, status: bytes) -> None:
    rig.request(status, index=STATUS_QUEUE)
    assert target.backend.leds == 0
    honest(rig, target)


def test_I1_a_writable_status_buffer_stays_as_it_is(rig: Rig, target: Target) -> None:
    assert rig.request(b"", 8, index=STATUS_QUEUE) == b""
    assert target.backend.queues[STATUS_QUEUE].chain_errors == 1


def test_I1_random_status(rig: Rig, target: Target) -> None:
    source = random.Random(5)
    for _ in range(300):
        rig.request(source.randbytes(source.randrange(1, 40)), index=STATUS_QUEUE)
    assert target.backend.leds < 8
    honest(rig, target)


# -- configuration space ---------------------------------------------------------------------------------------------


def test_I1_every_selection_is_answered(rig: Rig, target: Target) -> None:
    """Select and subsel of any value: at most 128 bytes, zeros behind them."""
    for select in range(256) if isinstance(target, Stepped) else (*range(4), *range(0x10, 0x14), 0x20, 0xFF):
        for subsel in (0, 1, 2, 3, 0x11, 0x14, 0x2F, 0x35, 0x40, 0xFF):
            target.backend.write_config(0, bytes((select, subsel)))
            config = target.backend.config_space()
            assert len(config) == CONFIG_BYTES
            assert config[2] <= 128
            assert not any(config[8 + config[2] :])
    honest(rig, target)


@pytest.mark.parametrize(("offset", "size"), [(2, 1), (8, 128), (100, 36), (135, 1)])
def test_I1_what_is_not_the_drivers_is_not_written(rig: Rig, target: Target, offset: int, size: int) -> None:
    before = target.backend.config_space()
    rig.frontend.set_config(offset, b"\xff" * size)
    assert target.backend.config_space() == before


@pytest.mark.parametrize(("offset", "size"), [(0, 256), (136, 8), (200, 56), (255, 1)])
def test_I1_reads_beyond_the_end_are_zeros(rig: Rig, offset: int, size: int) -> None:
    got = rig.frontend.get_config(offset, size)
    assert len(got) == size
    assert not any(got[max(0, CONFIG_BYTES - offset) :])


# -- rings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "descriptor",
    [
        pytest.param((0x10, 8, DESC_F_WRITE, 0), id="V5-in-a-hole"),
        pytest.param(((1 << 64) - 4, 8, DESC_F_WRITE, 0), id="V5-wraps"),
        pytest.param((0x10_0000, 0xFFFFFFFF, DESC_F_WRITE, 0), id="V6-longest"),
    ],
)
def test_V5_V6_bad_event_buffers_are_skipped(
    rig: Rig, target: Target, descriptor: tuple[int, int, int, int]
) -> None:
    """The event that met them waits for a sound one."""
    queue = rig.queues[0]
    queue.set_descriptor(FREE, *descriptor)
    queue.offer([FREE])
    inject(target)
    queue.kick(always=True)
    assert rig.wait_used(0, 1) == [(FREE, 0)]
    room = rig.ram.allocate(8)
    queue.submit((), [(room, 8)])
    assert rig.wait_used(0, 1)[0][1] == 8


@pytest.mark.parametrize("attack", ["loop", "head", "jump"])
def test_V1_V2_V3_a_broken_event_queue_keeps_the_events(rig: Rig, target: Target, attack: str) -> None:
    """Latched until reset; what was injected meanwhile arrives after it, whole."""
    queue = rig.queues[0]
    if attack == "loop":
        queue.set_descriptor(FREE, rig.ram.base, 8, DESC_F_WRITE | DESC_F_NEXT, FREE)
        queue.offer([FREE])
    elif attack == "head":
        queue.offer([64])
    else:
        queue.set_avail_index(queue.avail_index + 65)
    inject(target)
    assert wait_for(rig, queue.has_error)
    inject(target)
    assert target.backend.snapshot()["waiting_events"] == 8
    rig.restart(0)
    rooms = {}
    for _ in range(8):
        address = rig.ram.allocate(8)
        rooms[queue.submit((), [(address, 8)])] = address
    values = [EVENT.unpack(rig.ram.read(rooms[head], 8))[2] for head, _ in rig.wait_used(0, 8)]
    assert values == [1, 0, 0, 0, 1, 0, 0, 0]
    honest(rig, target)


@pytest.mark.parametrize("target", ["stepped"], indirect=True)
def test_V13_kicks_without_buffers_cost_nothing(rig: Rig, target: Target) -> None:
    for _ in range(1000):
        rig.queues[0].kick(always=True)
        rig.queues[1].kick(always=True)
    rig.settle()
    assert target.backend.queues[0].kicks <= 16 * 2, "kicks that come together are one"
    assert target.backend.queues[0].requests == 0
    honest(rig, target)


def test_V14_a_stop_leaves_waiting_events_for_the_next_start(rig: Rig, target: Target) -> None:
    inject(target)
    base = rig.frontend.stop(0)
    inject(target)
    rig.queues[0].kick(always=True)
    rig.settle()
    assert rig.queues[0].used_index == 0, "nothing is written to a stopped queue"
    rig.frontend.start(0, rig.queues[0], base=base)
    for _ in range(8):
        rig.queues[0].submit((), [(rig.ram.allocate(8), 8)])
    assert len(rig.wait_used(0, 8)) == 8
    honest(rig, target)


def test_V15_indirect_buffers_that_were_not_negotiated(target: Target) -> None:
    features = int(Feature.PROTOCOL_FEATURES | Feature.VERSION_1)
    with Rig(target, 2, size=64, features=features, event_idx=False) as rig:
        rig.queues[0].submit((), [(rig.ram.allocate(8), 8)], indirect=True)
        inject(target)
        assert wait_for(rig, rig.queues[0].has_error)
        rig.restart(0)
        for _ in range(4):
            rig.queues[0].submit((), [(rig.ram.allocate(8), 8)])
        assert len(rig.wait_used(0, 4)) == 4
        honest(rig, target)

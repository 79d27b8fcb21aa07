"""A hostile guest and the console: row C1, and rows V1 to V15 on its receive and control queues."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from rayos_devices.console.backend import ConsoleBackend
from rayos_devices.console.history import BATCH_BYTES, HISTORY_BYTES
from rayos_devices.console.port import PENDING_BYTES, PortSpec
from rayos_devices.console.wire import (
    CONTROL,
    CONTROL_RX,
    CONTROL_TX,
    ControlEvent,
    queue_count,
    rx_queue,
    tx_queue,
)
from rayos_devices.loop import Loop
from rayos_devices.virtio.features import TRANSPORT_FEATURES
from rayos_vmm.shared.spec import Device
from tests.framework.controlled import Bounds, RealConsole, SeenConsole
from tests.framework.driver import DESC_F_NEXT, DESC_F_WRITE
from tests.framework.guest_memory import GuestRam
from tests.framework.hostile import wait_for
from tests.framework.kept import Kept
from tests.framework.target import Rig, Stepped

SPECS = [PortSpec("shell", is_console=True), PortSpec("agent")]
QUEUES = queue_count(len(SPECS))
FREE = 60

Target = Stepped[ConsoleBackend] | RealConsole


def make(loop: Loop) -> ConsoleBackend:
    return ConsoleBackend("console", loop, ports=SPECS)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """A sandboxed worker, for all cases."""
    device = Device(kind="console", name="console", ports=("shell", "agent"))
    with Kept(tmp_path_factory.mktemp("console"), [device]) as kept:
        bounds = Bounds(kept, ["console"])
        yield kept
        bounds.check()


@pytest.fixture(params=["stepped", "served"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A console in this process, or the real worker's, with nothing left to read of the case before."""
    if request.param == "stepped":
        with Stepped(make) as stepped:
            yield stepped
            assert set(stepped.reasons) <= {"the frontend left"}
        return
    with RealConsole(request.getfixturevalue("kept")) as target:
        if any(port["waiting_bytes"] for port in target.snapshot()["ports"]):
            with Rig(target, QUEUES, size=64) as rig:
                for port in range(len(SPECS)):
                    say(rig, CONTROL.pack(port, ControlEvent.PORT_OPEN, 1))
                    room = rig.ram.allocate(PENDING_BYTES)
                    rig.queues[rx_queue(port)].submit((), [(room, PENDING_BYTES)])
                    rig.settle()
        target.backend = SeenConsole(target)
        yield target


@pytest.fixture
def rig(target: Target) -> Iterator[Rig]:
    with Rig(target, QUEUES, size=64, ram=GuestRam(8 << 20)) as rig:
        yield rig


def say(rig: Rig, data: bytes) -> None:
    rig.request(data, index=CONTROL_TX)


def honest(rig: Rig, target: Target) -> None:
    """A driver that begins anew gets everything: its ports, output, input."""
    console = target.backend
    say(rig, CONTROL.pack(0, ControlEvent.DEVICE_READY, 1))
    say(rig, CONTROL.pack(1, ControlEvent.PORT_READY, 1))
    say(rig, CONTROL.pack(1, ControlEvent.PORT_OPEN, 1))
    assert console.ports()[1]["guest_open"]
    before = console.total(1)
    rig.request(b"out", index=tx_queue(1))
    assert console.read(1, before, 9) == (before, b"out")
    rig.queues[rx_queue(1)].collect()
    console.write(1, b"in")
    room = rig.ram.allocate(PENDING_BYTES)
    rig.queues[rx_queue(1)].submit((), [(room, PENDING_BYTES)])
    written = rig.wait_used(rx_queue(1))[-1][1]
    assert rig.ram.read(room, written).endswith(b"in")


# -- floods ----------------------------------------------------------------------------------------------------------


def test_C1_a_flood_stays_within_its_ring(target: Target, rig: Rig) -> None:
    """50 MiB of output: no memory beyond the ring, the newest mebibyte readable, the rest a jump."""
    console = target.backend
    address = rig.ram.allocate(BATCH_BYTES)
    queue = rig.queues[1]
    head = queue.add(readable=[(address, BATCH_BYTES)])
    for _ in range(50):
        queue.offer([head])
        queue.kick(always=True)
        rig.settle()
        queue.reap()
    assert console.total(0) == 50 * BATCH_BYTES
    start, data = console.read(0, 0, 1 << 30)
    assert (start, len(data)) == (49 * BATCH_BYTES, HISTORY_BYTES)
    honest(rig, target)


def test_C1_a_log_does_not_grow_beyond_its_limit() -> None:
    fd = os.memfd_create("log")
    specs = [PortSpec("shell", is_console=True, log_fd=fd, log_limit_bytes=1000)]
    with Stepped(lambda loop: ConsoleBackend("console", loop, ports=specs)) as target:
        with Rig(target, 4, size=64) as rig:
            for _ in range(30):
                rig.request(b"x" * 333, index=1)
            assert os.fstat(fd).st_size == 1000
            assert target.backend.snapshot()["ports"][0]["log_dropped_bytes"] == 30 * 333 - 1000
    os.close(fd)


def test_C1_a_chain_beyond_a_batch_is_refused(rig: Rig, target: Target) -> None:
    """One chain of 4 GiB may not occupy the worker: it comes back unused, counted, nothing of it is kept."""
    address = rig.ram.allocate(BATCH_BYTES)
    for pieces in ([BATCH_BYTES, 1], [BATCH_BYTES] * 64):
        rig.queues[1].submit([(address, size) for size in pieces], indirect=True)
        assert rig.wait_used(1)[0][1] == 0
    assert target.backend.total(0) == 0
    assert target.backend.snapshot()["denials"] == {"invalid": 2}
    honest(rig, target)


def test_C1_a_flood_of_empty_chains(rig: Rig, target: Target) -> None:
    queue = rig.queues[1]
    heads = [queue.add(readable=[(rig.ram.base, 0)]) for _ in range(32)]
    for _ in range(100):
        queue.offer(heads)
        queue.kick(always=True)
        rig.settle()
        queue.reap()
    assert target.backend.total(0) == 0
    honest(rig, target)


@pytest.mark.parametrize("target", ["stepped"], indirect=True)
def test_C1_one_port_floods_and_another_answers(rig: Rig, target: Target) -> None:
    """While a queue has always more, the other ports are served in every round."""
    assert isinstance(target, Stepped)
    address = rig.ram.allocate(BATCH_BYTES)
    queue = rig.queues[1]
    heads = [queue.add(readable=[(address, BATCH_BYTES // 2)]) for _ in range(32)]
    queue.offer(heads)
    queue.kick(always=True)
    rig.queues[tx_queue(1)].submit([(rig.ram.put(b"me too"), 6)])
    for _ in range(3):
        target.loop.step(0)
    assert target.backend.read(1, 0, 9) == (0, b"me too")
    assert target.backend.total(0) < 32 * BATCH_BYTES // 2


def test_C1_bytes_of_any_kind_stay_bytes(rig: Rig, target: Target) -> None:
    """Escape sequences and rubbish are kept as they came: escaping is for whoever shows them."""
    data = b"\x1b]0;title\x07\x1b[2J<script>alert(1)</script>\xff\xfe\0" + random.Random(1).randbytes(3000)
    rig.request(data, index=1)
    assert target.backend.read(0, 0, 9999) == (0, data)


# -- control messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(CONTROL.pack(2, ControlEvent.PORT_READY, 1), id="port-2-of-2"),
        pytest.param(CONTROL.pack(0xFFFFFFFF, ControlEvent.PORT_OPEN, 1), id="port-largest"),
        pytest.param(CONTROL.pack(0x10001, ControlEvent.PORT_READY, 1), id="port-wraps-u16"),
        pytest.param(CONTROL.pack(0, ControlEvent.PORT_ADD, 1), id="add-is-ours"),
        pytest.param(CONTROL.pack(0, ControlEvent.PORT_REMOVE, 1), id="remove-is-ours"),
        pytest.param(CONTROL.pack(0, ControlEvent.CONSOLE_PORT, 1), id="console-is-ours"),
        pytest.param(CONTROL.pack(0, ControlEvent.RESIZE, 0) + b"\x50\0\x19\0", id="resize-is-ours"),
        pytest.param(CONTROL.pack(0, ControlEvent.PORT_NAME, 1) + b"evil", id="name-is-ours"),
        pytest.param(CONTROL.pack(0, 8, 0), id="event-8"),
        pytest.param(CONTROL.pack(0, 0xFFFF, 0xFFFF), id="event-largest"),
    ],
)
def test_C1_control_messages_that_cannot_be(rig: Rig, target: Target, message: bytes) -> None:
    """Counted, nothing changed."""
    before = target.backend.pack_state()
    say(rig, message)
    assert target.backend.pack_state() == before
    assert target.backend.snapshot()["denials"] == {"invalid": 1}
    honest(rig, target)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_C1_short_control_messages(rig: Rig, target: Target, size: int) -> None:
    say(rig, bytes(size))
    assert target.backend.queues[CONTROL_TX].chain_errors == 1
    honest(rig, target)


def test_C1_a_control_message_in_single_bytes(rig: Rig, target: Target) -> None:
    start = rig.ram.put(CONTROL.pack(1, ControlEvent.PORT_OPEN, 1))
    rig.queues[CONTROL_TX].submit([(start + i, 1) for i in range(8)], indirect=True)
    rig.wait_used(CONTROL_TX)
    assert target.backend.ports()[1]["guest_open"]


def test_C1_a_flood_of_control_messages_keeps_no_queue(rig: Rig, target: Target) -> None:
    """100 times everything, and no buffers for the answers: the state stays small, the answers are told once."""
    size = len(target.backend.pack_state())
    for _ in range(100):
        say(rig, CONTROL.pack(0, ControlEvent.DEVICE_READY, 1))
        for port in (0, 1):
            say(rig, CONTROL.pack(port, ControlEvent.PORT_READY, 1))
            say(rig, CONTROL.pack(port, ControlEvent.PORT_OPEN, 1))
        target.backend.resize(0, 80, 25)
    assert len(target.backend.pack_state()) == size
    for _ in range(20):
        rig.queues[CONTROL_RX].submit((), [(rig.ram.allocate(16), 16)])
    rig.settle()
    assert len(rig.queues[CONTROL_RX].collect()) == 6  # CONSOLE_PORT, NAME, OPEN, RESIZE; NAME, OPEN
    honest(rig, target)


@pytest.mark.parametrize("size", [1, 7])
def test_C1_buffers_too_small_for_a_control_message(rig: Rig, target: Target, size: int) -> None:
    """They come back empty; the message goes into the next that fits."""
    for _ in range(3):
        rig.queues[CONTROL_RX].submit((), [(rig.ram.allocate(16), size)])
    rig.heap = rig.ram.allocate(0)
    say(rig, CONTROL.pack(0, ControlEvent.DEVICE_READY, 1))
    assert [written for _, written in rig.wait_used(CONTROL_RX, 3)] == [0, 0, 0]
    room = rig.ram.allocate(8)
    rig.queues[CONTROL_RX].submit((), [(room, 8)])
    assert rig.wait_used(CONTROL_RX)[0][1] == 8
    assert rig.ram.read(room, 8) == CONTROL.pack(0, ControlEvent.PORT_ADD, 1)
    honest(rig, target)


def test_C1_a_name_that_does_not_fit_waits(rig: Rig, target: Target) -> None:
    say(rig, CONTROL.pack(1, ControlEvent.PORT_READY, 1))
    rig.heap = rig.ram.allocate(0)
    rig.queues[CONTROL_RX].submit((), [(rig.ram.allocate(16), 12)])
    assert rig.wait_used(CONTROL_RX)[0][1] == 0
    rig.queues[CONTROL_RX].submit((), [(rig.ram.allocate(16), 13)])
    assert rig.wait_used(CONTROL_RX)[0][1] == 13
    honest(rig, target)


def test_C1_random_conversations(rig: Rig, target: Target) -> None:
    """Whatever is said in whatever order: alive, and a driver that begins anew gets everything."""
    source = random.Random(7)
    for _ in range(500):
        if source.random() < 0.5:
            say(rig, CONTROL.pack(source.choice((0, 1, 2, 9)), source.randrange(10), source.randrange(3)))
        elif source.random() < 0.5:
            say(rig, source.randbytes(source.randrange(1, 30)))
        else:
            target.backend.resize(0, source.randrange(200), source.randrange(99))
            target.backend.write(source.randrange(2), b"x")
    honest(rig, target)


# -- receive buffers -------------------------------------------------------------------------------------------------


def open_port(rig: Rig, port: int) -> None:
    say(rig, CONTROL.pack(port, ControlEvent.PORT_OPEN, 1))
    rig.heap = rig.ram.allocate(0)


def test_C1_buffers_without_room_lose_nothing(rig: Rig, target: Target) -> None:
    open_port(rig, 1)
    queue = rig.queues[rx_queue(1)]
    readable = rig.ram.put(b"\xaa" * 32)
    queue.submit([(readable, 32)], [])
    queue.submit([], [(readable, 0)])
    target.backend.write(1, b"data")
    assert [written for _, written in rig.wait_used(rx_queue(1), 2)] == [0, 0]
    assert rig.ram.read(readable, 32) == b"\xaa" * 32
    room = rig.ram.allocate(8)
    queue.submit((), [(room, 8)])
    assert rig.wait_used(rx_queue(1))[0][1] == 4
    assert rig.ram.read(room, 4) == b"data"


def test_C1_single_byte_buffers(rig: Rig, target: Target) -> None:
    open_port(rig, 1)
    queue = rig.queues[rx_queue(1)]
    target.backend.write(1, bytes(range(200)))
    got = b""
    while len(got) < 200:
        rooms = {}
        for _ in range(32):
            room = rig.ram.allocate(1)
            rooms[queue.submit((), [(room, 1)])] = room
        rig.settle()
        got += b"".join(rig.ram.read(rooms[head], size) for head, size in queue.collect())
    assert got == bytes(range(200))


def test_C1_a_guest_that_never_reads_costs_64_kib(rig: Rig, target: Target) -> None:
    taken = sum(target.backend.write(0, b"x" * 10_000) for _ in range(100))
    assert taken == PENDING_BYTES
    assert target.backend.write(0, b"x") == 0


# -- rings -----------------------------------------------------------------------------------------------------------

RINGS = [0, CONTROL_RX, CONTROL_TX, rx_queue(1), tx_queue(1)]


@pytest.mark.parametrize("index", RINGS)
@pytest.mark.parametrize("attack", ["loop", "next", "head", "jump"])
def test_V1_V2_V3_each_queue_breaks_alone(rig: Rig, target: Target, index: int, attack: str) -> None:
    """Latched until reset, and the other queues go on."""
    say(rig, CONTROL.pack(0, ControlEvent.DEVICE_READY, 1))
    open_port(rig, 0)
    open_port(rig, 1)
    queue = rig.queues[index]
    if attack == "loop":
        queue.set_descriptor(FREE, rig.ram.base, 1, DESC_F_NEXT, FREE)
        queue.offer([FREE])
    elif attack == "next":
        queue.set_descriptor(FREE, rig.ram.base, 1, DESC_F_NEXT, 64)
        queue.offer([FREE])
    elif attack == "head":
        queue.offer([0xFFFF])
    else:
        queue.set_avail_index(queue.avail_index + 65)
    queue.kick(always=True)
    target.backend.write(0, b"wake")
    target.backend.write(1, b"wake")
    target.backend.resize(0, 80, 25)
    assert wait_for(rig, queue.has_error)
    assert target.backend.queues[index].broken
    others = [number for number in RINGS if number != index]
    assert not any(target.backend.queues[number].broken for number in others)
    rig.restart(index)
    honest(rig, target)


@pytest.mark.parametrize(
    "descriptor",
    [
        pytest.param((0x10, 8, DESC_F_WRITE, 0), id="V5-in-a-hole"),
        pytest.param(((1 << 64) - 4, 8, DESC_F_WRITE, 0), id="V5-wraps"),
        pytest.param((0x10_0000, 0xFFFFFFFF, DESC_F_WRITE, 0), id="V6-longest"),
    ],
)
def test_V5_V6_bad_receive_buffers_lose_nothing(
    rig: Rig, target: Target, descriptor: tuple[int, int, int, int]
) -> None:
    open_port(rig, 1)
    queue = rig.queues[rx_queue(1)]
    queue.set_descriptor(FREE, *descriptor)
    queue.offer([FREE])
    queue.kick(always=True)
    target.backend.write(1, b"data")
    assert rig.wait_used(rx_queue(1)) == [(FREE, 0)]
    honest(rig, target)


def test_V14_a_stop_and_a_start_lose_and_double_nothing(rig: Rig, target: Target) -> None:
    open_port(rig, 1)
    index = rx_queue(1)
    queue = rig.queues[index]
    first = rig.ram.allocate(8)
    queue.submit((), [(first, 4)])
    target.backend.write(1, b"abcdef")
    rig.settle()
    base = rig.frontend.stop(index)
    room = rig.ram.allocate(8)
    queue.submit((), [(room, 8)])
    queue.kick(always=True)
    rig.settle()
    assert queue.used_index == 1, "nothing moves in a stopped queue"
    rig.frontend.start(index, queue, base=base)
    assert [written for _, written in rig.wait_used(index, 2)] == [4, 2]
    assert rig.ram.read(first, 4) + rig.ram.read(room, 2) == b"abcdef"


def test_V15_control_queues_without_multiport_are_not_read(target: Target) -> None:
    with Rig(target, QUEUES, size=64, features=int(TRANSPORT_FEATURES)) as rig:
        for index in (CONTROL_TX, tx_queue(1)):
            rig.queues[index].submit([(rig.ram.put(CONTROL.pack(0, ControlEvent.PORT_OPEN, 1)), 8)])
        rig.settle()
        assert not target.backend.ports()[0]["guest_open"]
        assert rig.queues[CONTROL_TX].used_index == 0
        assert target.backend.total(1) == 0
        rig.request(b"still", index=1)
        assert target.backend.read(0, 0, 9) == (0, b"still")


@pytest.mark.parametrize("offset", [0, 4, 6, 8, 9, 11, 12, 200])
def test_C1_configuration_writes(rig: Rig, target: Target, offset: int) -> None:
    """Only the emergency character is the driver's to write."""
    before = target.backend.config_space()
    rig.frontend.set_config(offset, b"Z" * min(56, 256 - offset))
    assert target.backend.config_space() == before
    expected = b"Z" if offset <= 8 else b""
    assert target.backend.read(0, 0, 9) == (0, expected)
    honest(rig, target)


@pytest.mark.parametrize(("offset", "size"), [(0, 256), (11, 8), (12, 4), (255, 1)])
def test_C1_reads_beyond_the_configuration_are_zeros(rig: Rig, offset: int, size: int) -> None:
    got = rig.frontend.get_config(offset, size)
    assert len(got) == size
    assert not any(got[max(0, 12 - offset) :])


def test_V9_output_is_what_was_there_once(rig: Rig, target: Target) -> None:
    """History, log and total are of one copy: a buffer rewritten afterwards changes none of them."""
    address = rig.ram.put(b"first")
    rig.queues[1].submit([(address, 5)])
    rig.wait_used(1)
    rig.ram.write(address, b"later")
    assert target.backend.read(0, 0, 9) == (0, b"first")

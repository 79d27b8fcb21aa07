"""The console as its driver and as its viewers see it."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from rayos_devices.console.backend import MAX_PORTS, ConsoleBackend
from rayos_devices.console.chardev import serve_chardevs
from rayos_devices.console.history import BATCH_BYTES, HISTORY_BYTES, OUTPUT_RING_BYTES, ByteRing, read_back
from rayos_devices.console.port import PENDING_BYTES, PORT_BYTES, ConsolePort, PortSpec, Todo
from rayos_devices.console.wire import (
    CONTROL,
    CONTROL_RX,
    CONTROL_TX,
    EMERG_WR_OFFSET,
    ConsoleFeature,
    ControlEvent,
    queue_count,
    rx_queue,
    tx_queue,
)
from rayos_devices.errors import ConfigurationError, RequestError
from rayos_devices.gate import EVERYTHING, Gate, Op
from rayos_devices.loop import Loop
from rayos_devices.virtio.features import TRANSPORT_FEATURES
from tests.framework.driver import DriverQueue
from tests.framework.guest_memory import GuestRam
from tests.framework.target import Rig, Stepped

SPECS = [PortSpec("shell", is_console=True), PortSpec("agent"), PortSpec("")]


def make(loop: Loop) -> ConsoleBackend:
    return ConsoleBackend("console", loop, ports=SPECS)


class Driver:
    """A guest's driver for all ports."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.rooms: dict[tuple[int, int], int] = {}

    def room(self, queue: int, count: int, size: int = 64) -> None:
        for _ in range(count):
            address = self.rig.ram.allocate(size)
            self.rooms[queue, self.rig.queues[queue].submit((), [(address, size)])] = address

    def take(self, queue: int) -> list[bytes]:
        """Returns the bytes that arrived."""
        self.rig.settle()
        driver = self.rig.queues[queue]
        return [self.rig.ram.read(self.rooms[queue, head], size) for head, size in driver.collect()]

    def say(self, port: int, event: ControlEvent, value: int = 1) -> None:
        self.rig.request(CONTROL.pack(port, event, value), index=CONTROL_TX)

    def messages(self) -> list[tuple[int, ControlEvent, int, bytes]]:
        taken = []
        for data in self.take(CONTROL_RX):
            port, event, value = CONTROL.unpack_from(data)
            taken.append((port, ControlEvent(event), value, data[CONTROL.size :]))
        return taken

    def open(self, *ports: int) -> None:
        self.say(0, ControlEvent.DEVICE_READY)
        for port in ports:
            self.say(port, ControlEvent.PORT_READY)
            self.say(port, ControlEvent.PORT_OPEN)


@pytest.fixture
def target() -> Iterator[Stepped[ConsoleBackend]]:
    with Stepped(make) as stepped:
        yield stepped


@pytest.fixture
def rig(target: Stepped[ConsoleBackend]) -> Iterator[Rig]:
    with Rig(target, queue_count(len(SPECS)), size=64) as rig:
        # Room for messages lies below what `request` gives back.
        yield rig


@pytest.fixture
def driver(rig: Rig) -> Driver:
    driver = Driver(rig)
    driver.room(CONTROL_RX, 32, 16)
    rig.heap = rig.ram.allocate(0)
    return driver


# -- wire ------------------------------------------------------------------------------------------------------------


def test_queues_of_ports() -> None:
    """VIRTIO 1.3, 5.3.2."""
    assert [(rx_queue(n), tx_queue(n)) for n in range(4)] == [(0, 1), (4, 5), (6, 7), (8, 9)]
    assert queue_count(3) == 8


def test_config_space(rig: Rig, target: Stepped[ConsoleBackend]) -> None:
    assert rig.frontend.get_config(0, 12) == bytes((0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0))
    target.backend.resize(0, 80, 25)
    assert rig.frontend.get_config(0, 4) == bytes((80, 0, 25, 0))


def test_what_is_offered(rig: Rig) -> None:
    for feature in ConsoleFeature:
        assert rig.offered & feature


@pytest.mark.parametrize("count", [0, MAX_PORTS + 1])
def test_a_wrong_number_of_ports_is_refused(count: int) -> None:
    loop = Loop()
    with pytest.raises(ConfigurationError, match=f"{count} console ports: 1 to 31"):
        ConsoleBackend("console", loop, ports=[PortSpec("")] * count)
    loop.close()


@pytest.mark.parametrize("name", ["x" * 256, "a\0b"])
def test_a_name_no_guest_can_be_told_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="port name"):
        PortSpec(name).check()


def test_the_state_fits_its_store() -> None:
    loop = Loop()
    console = ConsoleBackend("console", loop, ports=[PortSpec("")] * MAX_PORTS)
    assert len(console.pack_state()) == ConsoleBackend.STATE_BYTES
    loop.close()


# -- history ---------------------------------------------------------------------------------------------------------


def test_a_ring_wraps() -> None:
    ring = ByteRing(memoryview(bytearray(8)))
    ring.store(6, b"abcd")
    assert bytes(ring.view) == b"cd\0\0\0\0ab"
    assert ring.load(6, 4) == b"abcd"
    assert [bytes(piece) for piece in ring.pieces(6, 4)] == [b"ab", b"cd"]
    ring.store(8, b"01234567")
    assert ring.load(8, 8) == b"01234567"


def test_what_is_too_old_jumps_forward() -> None:
    ring = ByteRing(memoryview(bytearray(OUTPUT_RING_BYTES)))
    total = OUTPUT_RING_BYTES + 10
    assert read_back(ring, total, 0, 5)[0] == total - HISTORY_BYTES
    assert read_back(ring, total, total - 3, 99) == (total - 3, bytes(3))
    assert read_back(ring, total, total + 7, 99) == (total, b"")
    assert read_back(ring, 3, 0, 99) == (0, bytes(3))


def test_a_batch_that_never_became_true_spoils_nothing() -> None:
    """The bytes copied in beyond the total lie outside of what can be read."""
    port = ConsolePort(0, PortSpec(""), memoryview(bytearray(PORT_BYTES)))
    old = bytes(range(256)) * (OUTPUT_RING_BYTES // 256)
    port.take_output([memoryview(old[:BATCH_BYTES])], 0)
    port.take_output([memoryview(old[BATCH_BYTES:])], 0)
    before = port.read(0, HISTORY_BYTES)
    port.output.store(port.total, b"\xff" * BATCH_BYTES)
    assert port.read(0, HISTORY_BYTES) == before


def test_a_port_unpacks_to_itself() -> None:
    port = ConsolePort(0, PortSpec("p"), memoryview(bytearray(PORT_BYTES)))
    port.take_output([memoryview(b"abc")], 0)
    port.give(b"xyz")
    port.columns, port.rows, port.guest_open, port.todo = 80, 25, True, Todo.NAME | Todo.RESIZE
    other = ConsolePort(0, PortSpec("p"), memoryview(bytearray(PORT_BYTES)))
    other.unpack(port.pack())
    assert other.pack() == port.pack()
    assert (other.total, other.waiting, other.guest_open, other.todo) == (3, 3, True, Todo.NAME | Todo.RESIZE)


def test_the_log_is_limited_and_says_what_it_dropped() -> None:
    fd = os.memfd_create("log")
    port = ConsolePort(0, PortSpec("", log_fd=fd, log_limit_bytes=10), memoryview(bytearray(PORT_BYTES)))
    for piece in (b"01234", b"56789abc", b"def"):
        port.take_output([memoryview(piece)], 0)
    assert os.pread(fd, 99, 0) == b"0123456789"
    assert port.log_dropped_bytes == 6
    assert port.read(0, 99) == (0, b"0123456789abcdef")
    os.close(fd)


def test_a_log_that_cannot_be_written_is_counted() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    port = ConsolePort(0, PortSpec("", log_fd=reader), memoryview(bytearray(PORT_BYTES)))
    port.take_output([memoryview(b"x")], 0)
    os.close(reader)
    assert port.log_errors == 1
    assert port.total == 1


# -- the conversation ------------------------------------------------------------------------------------------------


def test_handshake(driver: Driver, target: Stepped[ConsoleBackend]) -> None:
    driver.say(0, ControlEvent.DEVICE_READY)
    assert driver.messages() == [(port, ControlEvent.PORT_ADD, 1, b"") for port in range(3)]
    driver.say(0, ControlEvent.PORT_READY)
    assert driver.messages() == [
        (0, ControlEvent.CONSOLE_PORT, 1, b""),
        (0, ControlEvent.PORT_NAME, 1, b"shell"),
        (0, ControlEvent.PORT_OPEN, 1, b""),
    ]
    driver.say(2, ControlEvent.PORT_READY)
    assert driver.messages() == [(2, ControlEvent.PORT_OPEN, 1, b"")]
    driver.say(2, ControlEvent.PORT_OPEN)
    assert [port["guest_open"] for port in target.backend.ports()] == [False, False, True]
    driver.say(2, ControlEvent.PORT_OPEN, 0)
    described = {"port": 2, "name": "", "is_console": False, "guest_open": False, "columns": 0, "rows": 0}
    assert target.backend.ports()[2] == described


def test_messages_wait_for_room(target: Stepped[ConsoleBackend], rig: Rig) -> None:
    driver = Driver(rig)
    driver.say(0, ControlEvent.DEVICE_READY)
    rig.heap = rig.ram.allocate(0)
    driver.room(CONTROL_RX, 1, 16)
    assert driver.messages() == [(0, ControlEvent.PORT_ADD, 1, b"")]
    driver.room(CONTROL_RX, 2, 16)
    assert [message[0] for message in driver.messages()] == [1, 2]


def test_a_driver_that_begins_anew_hears_all_again(driver: Driver, target: Stepped[ConsoleBackend]) -> None:
    driver.open(0, 1)
    driver.messages()
    driver.say(0, ControlEvent.DEVICE_READY)
    assert [message[:2] for message in driver.messages()] == [
        (port, ControlEvent.PORT_ADD) for port in range(3)
    ]
    assert not any(port["guest_open"] for port in target.backend.ports())


def test_resize_reaches_the_console_alone(driver: Driver, target: Stepped[ConsoleBackend]) -> None:
    driver.open(0, 1)
    driver.messages()
    target.backend.resize(0, 100, 30)
    target.backend.resize(0, 132, 43)
    target.backend.resize(1, 80, 25)
    assert driver.messages() == [(0, ControlEvent.RESIZE, 0, bytes((132, 0, 43, 0)))]


@pytest.mark.parametrize(("columns", "rows"), [(-1, 25), (80, 65536)])
def test_a_size_that_cannot_be_is_refused(target: Stepped[ConsoleBackend], columns: int, rows: int) -> None:
    with pytest.raises(RequestError, match="0 to 65535"):
        target.backend.resize(0, columns, rows)


# -- bytes -----------------------------------------------------------------------------------------------------------


def test_output_by_offset(driver: Driver, target: Stepped[ConsoleBackend]) -> None:
    seen: list[int] = []
    target.backend.on_output = seen.append
    driver.rig.request(b"hello ", index=tx_queue(0))
    driver.rig.request(b"world", index=tx_queue(0))
    driver.rig.request(b"agent", index=tx_queue(1))
    assert target.backend.read(0, 0, 99) == (0, b"hello world")
    assert target.backend.read(0, 6, 3) == (6, b"wor")
    assert target.backend.total(0) == 11
    assert target.backend.read(1, 0, 99) == (0, b"agent")
    assert seen == [0, 0, 1]


def test_input_waits_until_the_port_is_open(driver: Driver, target: Stepped[ConsoleBackend]) -> None:
    driver.room(rx_queue(1), 2, 8)
    assert target.backend.write(1, b"hello world") == 11
    assert driver.take(rx_queue(1)) == []
    driver.rig.heap = driver.rig.ram.allocate(0)
    driver.open(1)
    assert driver.take(rx_queue(1)) == [b"hello wo", b"rld"]


def test_a_driver_without_multiport_has_port_0(target: Stepped[ConsoleBackend]) -> None:
    with Rig(target, 2, features=int(TRANSPORT_FEATURES)) as rig:
        driver = Driver(rig)
        driver.room(0, 1)
        target.backend.write(0, b"hi")
        assert driver.take(0) == [b"hi"]
        rig.heap = rig.ram.allocate(0)
        rig.request(b"out", index=1)
        assert target.backend.read(0, 0, 9) == (0, b"out")


def test_back_pressure(driver: Driver, target: Stepped[ConsoleBackend]) -> None:
    """Without buffers the pending ring fills; then nothing is taken; room is told; every byte arrives once."""
    driver.open(0)
    data = bytes(i % 251 for i in range(PENDING_BYTES + 100))
    rooms: list[int] = []
    target.backend.on_room = rooms.append
    assert target.backend.write(0, data) == PENDING_BYTES
    assert target.backend.write(0, data[PENDING_BYTES:]) == 0
    assert rooms == []
    driver.room(rx_queue(0), 1, 64)
    got = b"".join(driver.take(rx_queue(0)))
    assert rooms == [0]
    assert target.backend.write(0, data[PENDING_BYTES:]) == 64
    assert got == data[:64]
    for _ in range(33):
        driver.room(rx_queue(0), 32, 64)
        got += b"".join(driver.take(rx_queue(0)))
    assert got == data[: PENDING_BYTES + 64]


def test_a_write_asked_again_is_done_once(driver: Driver, target: Stepped[ConsoleBackend]) -> None:
    driver.open(0)
    assert target.backend.write(0, b"abc", token=7) == 3
    assert target.backend.write(0, b"abc", token=7) == 3
    assert target.backend.write(0, b"d", token=8) == 1
    driver.room(rx_queue(0), 1)
    assert driver.take(rx_queue(0)) == [b"abcd"]


def test_a_flood_leaves_others_their_turn(target: Stepped[ConsoleBackend]) -> None:
    """One turn takes at most BUDGET chains, and at most one batch of bytes."""
    with GuestRam(8 << 20) as ram, Rig(target, 8, size=256, ram=ram) as rig:
        buffer = rig.ram.allocate(BATCH_BYTES)
        queue = rig.queues[1]
        heads = [queue.add(readable=[(buffer, 16)]) for _ in range(200)]
        queue.offer(heads)
        assert target.backend.run_queue(1) is True
        assert queue.used_index == ConsoleBackend.BUDGET
        assert target.backend.run_queue(1) is False
        big = [queue.add(readable=[(buffer, BATCH_BYTES // 2 + 1)]) for _ in range(3)]
        queue.offer(big)
        for used in (201, 202):
            assert target.backend.run_queue(1) is True
            assert queue.used_index == used
        assert target.backend.run_queue(1) is False
        assert target.backend.total(0) == 200 * 16 + 3 * (BATCH_BYTES // 2 + 1)
        assert target.backend.read(0, 0, 1)[0] == target.backend.total(0) - HISTORY_BYTES


def test_the_gate_is_asked() -> None:
    allowed = EVERYTHING
    for op in (Op.CONSOLE_WRITE, Op.CONSOLE_READ, Op.CONSOLE_RESIZE):
        allowed &= ~(1 << op.index)
    with (
        Stepped(
            lambda loop: ConsoleBackend("console", loop, ports=SPECS, gate=Gate(allowed=allowed))
        ) as target,
        Rig(target, 8, size=64) as rig,
    ):
        console = target.backend
        with pytest.raises(RequestError, match=r"3 bytes for console port 0 refused: capability"):
            console.write(0, b"abc")
        with pytest.raises(RequestError, match="resize of console port 0 refused"):
            console.resize(0, 80, 25)
        assert rig.request(b"secret", index=1) == b""
        console.write_config(EMERG_WR_OFFSET, b"!\0\0\0")
        assert console.total(0) == 0
        operations = console.snapshot()["operations"]
        assert [operations[op]["denied"] for op in ("console.write", "console.read", "console.resize")] == [
            2,
            1,
            1,
        ]


def test_counters(driver: Driver, target: Stepped[ConsoleBackend]) -> None:
    driver.open(0)
    driver.rig.request(b"12345", index=1)
    target.backend.write(0, b"123")
    snapshot = target.backend.snapshot()
    assert snapshot["operations"]["console.write"]["bytes"] == 5
    assert snapshot["operations"]["console.read"]["bytes"] == 3
    assert snapshot["ports"][0]["output_bytes"] == 5
    assert snapshot["ports"][0]["waiting_bytes"] == 3


# -- EMERG_WRITE and taking over -------------------------------------------------------------------------------------


def test_emergency_characters_need_no_queue(target: Stepped[ConsoleBackend]) -> None:
    frontend = target.connect()
    frontend.negotiate()
    for character in b"panic":
        frontend.set_config(EMERG_WR_OFFSET, bytes((character, 0, 0, 0)))
    frontend.set_config(0, bytes((80, 0, 25, 0, 9, 0, 0, 0, 0, 0, 0, 0)))
    frontend.set_config(8, b"")
    assert target.backend.read(0, 0, 99) == (0, b"panic")
    assert target.backend.ports()[0]["port"] == 0
    assert target.backend.config_space()[4] == 3, "the rest is not the driver's to write"
    frontend.close()


def test_a_new_session_starts_with_closed_ports(driver: Driver, target: Stepped[ConsoleBackend]) -> None:
    driver.open(0, 1)
    assert target.backend.ports()[0]["guest_open"]
    driver.rig.frontend.close()
    target.settle()
    assert not target.backend.ports()[0]["guest_open"]


# -- behind chardev sockets ------------------------------------------------------------------------------------------


@pytest.fixture
def chardevs() -> Iterator[tuple[Loop, ConsoleBackend, list[socket.socket]]]:
    loop = Loop()
    console = make(loop)
    listening = [socket.socket(socket.AF_UNIX) for _ in SPECS]
    for sock in listening:
        sock.bind("")  # an abstract address of the kernel's choice
        sock.listen(1)
    ports = serve_chardevs(console, listening, loop)
    yield loop, console, listening
    for port in ports:
        port.close()
    for sock in listening:
        sock.close()
    loop.close()


def turn(loop: Loop) -> None:
    for _ in range(8):
        loop.step(0)


def test_chardev_both_ways(chardevs: tuple[Loop, ConsoleBackend, list[socket.socket]]) -> None:
    loop, console, listening = chardevs
    console.write(1, b"before ")
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.connect(listening[1].getsockname())
        turn(loop)
        assert [port["guest_open"] for port in console.ports()] == [False, True, False]
        console.write(1, b"after")
        turn(loop)
        assert qemu.recv(99) == b"before after"
        qemu.send(b"hello")
        turn(loop)
        assert console.read(1, 0, 99) == (0, b"hello")
    turn(loop)
    assert not console.ports()[1]["guest_open"]
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.connect(listening[1].getsockname())
        turn(loop)
        qemu.send(b" again")
        turn(loop)
        assert console.read(1, 0, 99) == (0, b"hello again")


def test_chardev_back_pressure(chardevs: tuple[Loop, ConsoleBackend, list[socket.socket]]) -> None:
    """A QEMU that does not read fills the ring; nothing is lost, and everybody goes on when it reads."""
    loop, console, listening = chardevs
    data = bytes(i % 253 for i in range(600_000))
    rooms: list[int] = []
    console.on_room = rooms.append
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.connect(listening[0].getsockname())
        qemu.setblocking(False)
        turn(loop)
        done = 0
        while size := console.write(0, data[done : done + 50_000]):
            done += size
            turn(loop)
        assert done < len(data), "the socket and the ring are full"
        got = b""
        while len(got) < len(data):
            with suppress(BlockingIOError):
                got += qemu.recv(1 << 16)
            done += console.write(0, data[done:])
            turn(loop)
        assert got == data
        assert rooms


def test_rig_leaves_nothing(target: Stepped[ConsoleBackend]) -> None:
    """Queues that a session never started are not touched."""
    with GuestRam() as ram:
        queue = DriverQueue(ram, 64)
        frontend = target.connect()
        frontend.negotiate()
        frontend.set_memory(ram)
        frontend.start(1, queue)
        target.backend.write(0, b"x")
        target.backend.resize(0, 1, 1)
        target.settle()
        assert target.backend.snapshot()["ports"][0]["waiting_bytes"] == 1
        frontend.close()
        target.settle()
        queue.close()


def test_a_reader_that_must_miss_nothing_is_waited_for() -> None:
    """The guest writes ten times what is kept; a reader that holds, and is slow, gets every byte in order. Another port
    goes on meanwhile, and so does this one when the reader is gone."""
    with Stepped(make) as target, Rig(target, queue_count(len(SPECS))) as rig:
        console = target.backend
        assert isinstance(console, ConsoleBackend)
        console.hold(1, 77, 0)
        data = random.Random(3).randbytes(64 << 10)
        at = rig.ram.put(data)
        sent = got = 0
        wanted = 10 * HISTORY_BYTES // len(data)
        queue = rig.queues[tx_queue(1)]
        while got < wanted * len(data):
            while sent < wanted and queue.free:
                queue.submit([(at, len(data))])
                sent += 1
            rig.settle()
            queue.collect()
            assert console.total(1) - got <= HISTORY_BYTES
            start, chunk = console.read(1, got, 300_000)
            assert start == got and chunk == (data * 6)[got % len(data) :][: len(chunk)]
            got += len(chunk)
            console.hold(1, 77, got)
        for _ in range(wanted):
            queue.submit([(at, len(data))])
        rig.queues[tx_queue(0)].submit([(at, len(data))])
        rig.settle()
        held = console.total(1) - got
        assert HISTORY_BYTES // 2 < held <= HISTORY_BYTES and console.total(0) == len(data)
        console.release(77)
        rig.settle()
        assert console.total(1) == 2 * wanted * len(data)


def test_a_stream_is_held_as_well(chardevs: tuple[Loop, ConsoleBackend, list[socket.socket]]) -> None:
    """Where QEMU is the device: what it sends stays in the socket until there is room."""
    loop, console, listening = chardevs
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.connect(listening[1].getsockname())
        qemu.setblocking(False)
        console.hold(1, 77, 0)
        data = random.Random(4).randbytes(1 << 20)
        sent = got = 0
        while got < 4 * len(data):
            with suppress(BlockingIOError):
                sent += qemu.send((data * 2)[sent % len(data) :][: 4 * len(data) - sent])
            turn(loop)
            start, chunk = console.read(1, got, 200_000)
            assert start == got and chunk == (data * 2)[got % len(data) :][: len(chunk)]
            got += len(chunk)
            console.hold(1, 77, got)

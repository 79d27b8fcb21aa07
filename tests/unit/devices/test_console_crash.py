"""The console loses and doubles nothing when its worker is killed at any instruction."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from rayos_devices.console.backend import ConsoleBackend
from rayos_devices.console.port import PortSpec
from rayos_devices.console.wire import (
    CONTROL,
    CONTROL_RX,
    CONTROL_TX,
    EMERG_WR_OFFSET,
    ConsoleFeature,
    ControlEvent,
    rx_queue,
    tx_queue,
)
from rayos_devices.loop import Loop
from rayos_devices.state import StateStore
from rayos_devices.virtio.features import TRANSPORT_FEATURES
from tests.framework.kill import Bench, Killed, Killer, every_kill, pairs

pytestmark = pytest.mark.interpreted

FEATURES = TRANSPORT_FEATURES | ConsoleFeature.MULTIPORT | ConsoleFeature.SIZE
ROOM = 64


class Guest:
    """A driver with two ports on a console whose worker may be killed."""

    def __init__(self, killer: Killer, log_fd: int = -1) -> None:
        self.state_fd = os.memfd_create("state")
        self.history_fd = os.memfd_create("history")
        specs = [PortSpec("shell", is_console=True, log_fd=log_fd), PortSpec("agent")]

        def make(loop: Loop) -> ConsoleBackend:
            state = StateStore(self.state_fd, ConsoleBackend.STATE_BYTES)
            return ConsoleBackend("console", loop, ports=specs, state=state, history_fd=self.history_fd)

        self.make = make
        self.bench = Bench(make, FEATURES, killer)
        self.messages: list[tuple[int, int, int, bytes]] = []
        self.received = {0: b"", 1: b""}
        self._rooms: dict[tuple[int, int], int] = {}

    def room(self, queue: int, count: int, size: int = ROOM) -> None:
        """Offer buffers on a receive queue."""
        driver = self.bench.queues[queue]
        for _ in range(count):
            address = self.bench.ram.allocate(size)
            head = driver.add(writable=[(address, size)])
            self._rooms[queue, head] = address
            driver.offer([head])

    def say(self, index: int, event: ControlEvent, value: int) -> None:
        self.send(CONTROL_TX, CONTROL.pack(index, event, value))

    def send(self, queue: int, data: bytes) -> None:
        driver = self.bench.queues[queue]
        driver.offer([driver.add(readable=[(self.bench.ram.put(data), len(data))])])

    def collect(self) -> None:
        """Take every used entry; each chain comes back exactly once."""
        for queue, driver in enumerate(self.bench.queues):
            for head, written in driver.collect():
                address = self._rooms.pop((queue, head), None)
                if address is None:
                    continue
                data = self.bench.ram.read(address, written)
                if queue == CONTROL_RX:
                    self.messages.append((*CONTROL.unpack_from(data), data[CONTROL.size :]))
                else:
                    self.received[0 if queue == 0 else 1] += data

    def open(self) -> None:
        """The whole handshake."""
        self.room(CONTROL_RX, 9)
        self.say(0, ControlEvent.DEVICE_READY, 1)
        self.bench.run()
        for port in (0, 1):
            self.say(port, ControlEvent.PORT_READY, 1)
            self.say(port, ControlEvent.PORT_OPEN, 1)
        self.bench.run()
        self.collect()

    def close(self) -> None:
        self.bench.close()
        os.close(self.state_fd)
        os.close(self.history_fd)


@contextmanager
def guest(killer: Killer, log_fd: int = -1) -> Iterator[Guest]:
    made = Guest(killer, log_fd)
    try:
        yield made
    finally:
        made.close()


def output(killer: Killer) -> None:
    with guest(killer) as g:
        sent = {0: b"", 1: b""}
        for round_ in range(2):
            for port in (0, 1):
                for number in range(3):
                    data = f"round {round_} port {port} chain {number}\n".encode()
                    sent[port] += data
                    g.send(tx_queue(port), data)
            g.bench.run()
        g.collect()
        for port in (0, 1):
            assert g.bench.backend.read(port, 0, 4096) == (0, sent[port])
            assert g.bench.queues[tx_queue(port)].used_index == 6


def data_for(g: Guest, port: int, data: bytes, token: int) -> None:
    """Write as the control client does: with a token, again until all of it was taken."""
    while data:
        data = data[g.bench.call(partial(ConsoleBackend.write, port=port, data=data, token=token)) :]
        token += 1
        g.bench.run()


def written(killer: Killer) -> None:
    with guest(killer) as g:
        g.open()
        for port in (0, 1):
            g.room(rx_queue(port), 3, 5)
        expected = {0: b"0123456789abcdefghij", 1: b"ABCDEFGH"}
        data_for(g, 0, expected[0], 100)
        data_for(g, 1, expected[1], 200)
        g.collect()
        assert g.received == {0: expected[0][:15], 1: expected[1]}, "what has room has arrived"
        g.room(rx_queue(0), 2, 5)
        g.bench.run()
        g.collect()
        assert g.received == expected


def handshake(killer: Killer) -> None:
    with guest(killer) as g:
        g.bench.call(lambda backend: backend.resize(0, 132, 43))
        g.open()
        assert [message for message in g.messages if message[0] == 0] == [
            (0, ControlEvent.PORT_ADD, 1, b""),
            (0, ControlEvent.CONSOLE_PORT, 1, b""),
            (0, ControlEvent.PORT_NAME, 1, b"shell"),
            (0, ControlEvent.PORT_OPEN, 1, b""),
            (0, ControlEvent.RESIZE, 0, b"\x84\0\x2b\0"),
        ]
        assert [message for message in g.messages if message[0] == 1] == [
            (1, ControlEvent.PORT_ADD, 1, b""),
            (1, ControlEvent.PORT_NAME, 1, b"agent"),
            (1, ControlEvent.PORT_OPEN, 1, b""),
        ]
        assert [port["guest_open"] for port in g.bench.backend.ports()] == [True, True]
        assert g.bench.backend.config_space()[:4] == b"\x84\0\x2b\0"


SCENARIOS = [output, written, handshake]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_once_at_every_instruction(scenario: Callable[[Killer], None]) -> None:
    """A kill between any two instructions neither loses nor doubles a byte or a message."""
    assert len(list(every_kill(scenario))) > 50


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_twice(scenario: Callable[[Killer], None]) -> None:
    """Nor does a successor that is killed while it takes over, or soon after."""
    unharmed = Killer()
    scenario(unharmed)
    for first, second in pairs(unharmed.count, (7, 23, 61)):
        scenario(Killer(first, second))


def test_log_is_byte_exact_after_every_kill() -> None:
    """The log holds each byte once, at its offset."""
    log_fd = os.memfd_create("log")

    def scenario(killer: Killer) -> None:
        os.ftruncate(log_fd, 0)
        with guest(killer, log_fd) as g:
            for number in range(4):
                g.send(tx_queue(0), f"line {number}\n".encode())
                g.bench.run()
            expected = b"line 0\nline 1\nline 2\nline 3\n"
            assert g.bench.backend.read(0, 0, 4096) == (0, expected)
            assert os.pread(log_fd, 4096, 0) == expected

    try:
        list(every_kill(scenario))
    finally:
        with suppress(OSError):
            os.close(log_fd)


def test_the_harness_sees_a_planted_fault() -> None:
    """A device that publishes before it saves is caught: the harness is worth its time."""

    class Careless(ConsoleBackend):
        def commit(self, queue: int) -> None:
            self.queues[queue].publish()
            super().commit(queue)

    def scenario(killer: Killer) -> None:
        state_fd, history_fd = os.memfd_create("state"), os.memfd_create("history")

        def make(loop: Loop) -> ConsoleBackend:
            state = StateStore(state_fd, ConsoleBackend.STATE_BYTES)
            return Careless("console", loop, ports=[PortSpec("")], state=state, history_fd=history_fd)

        bench = Bench(make, FEATURES, killer)
        try:
            driver = bench.queues[tx_queue(0)]
            driver.offer([driver.add(readable=[(bench.ram.put(b"hello"), 5)])])
            bench.run()
            assert bench.backend.read(0, 0, 99) == (0, b"hello")
        finally:
            bench.close()
            os.close(state_fd)
            os.close(history_fd)

    with pytest.raises(AssertionError):
        list(every_kill(scenario))


@pytest.mark.parametrize("is_published", [False, True])
def test_until_the_ring_has_spoken_hosts_wait(is_published: bool) -> None:
    """A successor that cannot know yet which state is true loses neither an output nor a request."""
    with guest(Killer()) as g:
        g.send(tx_queue(0), b"known ")
        g.bench.run()
        g.bench.call(lambda backend: backend.resize(0, 80, 25))
        # The predecessor copied and saved the next output, and died around its publish.
        before = g.bench.backend
        port = before._ports[0]
        g.send(tx_queue(0), b"maybe")
        vring = before.queues[tx_queue(0)]
        chain = vring.pop()
        assert chain is not None
        port.take_output(chain.readable, 0)
        vring.push(chain.head, 0)
        before._store.save(before.pack_state(), tx_queue(0), vring.next_used_index)
        if is_published:
            vring.publish()

        console = g.make(g.bench.loop)
        rooms: list[int] = []
        console.on_room = rooms.append
        assert console.is_undecided
        assert console.read(0, 0, 99) == (0, b"known ")
        assert console.write(0, b"in") == 0
        assert not console.resize(0, 132, 43)
        assert console.config_space()[0] == 80
        g.bench.backend = console
        g.bench.attach(resumed=True)
        assert rooms == [0, 1]
        assert console.resize(0, 132, 43) and console.config_space()[0] == 132
        assert console.write(0, b"in") == 2
        g.bench.run()
        assert console.read(0, 0, 99) == (0, b"known maybe")


def emergency(killer: Killer) -> str:
    """Returns the output of three emergency characters under kills. A worker killed in the middle of one has it told
    again, and the one before as well (`Transcript`).
    """
    state_fd, history_fd = os.memfd_create("state"), os.memfd_create("history")
    loop = Loop()

    def make() -> ConsoleBackend:
        state = StateStore(state_fd, ConsoleBackend.STATE_BYTES)
        return ConsoleBackend("console", loop, ports=[PortSpec("")], state=state, history_fd=history_fd)

    def write(console: ConsoleBackend, number: int) -> None:
        if console.is_new_write(number):
            console.write_config(EMERG_WR_OFFSET, b"?ABC"[number : number + 1] + b"\0\0\0")

    try:
        console = make()
        console.start_session(resumed=False)
        number = 1
        while number <= 3:
            try:
                killer.run(partial(write, console, number))
                number += 1
            except Killed:
                console = make()
                console.start_session(resumed=True)
                if number > 1:
                    write(console, number - 1)
        said = console.read(0, 0, 9)[1].decode()
        console.start_session(resumed=False)
        write(console, 1)
        assert console.read(0, 0, 9)[1].decode() == said + "A"  # another session counts anew
        return said
    finally:
        loop.close()
        os.close(state_fd)
        os.close(history_fd)


def test_an_emergency_character_is_printed_once_whenever_the_worker_dies() -> None:
    unharmed = Killer()
    assert emergency(unharmed) == "ABC"
    assert unharmed.count > 12
    for kill in range(unharmed.count):
        assert emergency(Killer(kill)) == "ABC", kill

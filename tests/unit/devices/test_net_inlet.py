"""A frame that goes from one ring of a process right into another: whole, in order, judged, counted as any other."""

from __future__ import annotations

import random
import struct
from array import array
from collections import deque
from typing import Any

import pytest

from rayos_devices.net.backend import RX, TX, NetBackend
from rayos_devices.net.filter import Judge
from rayos_devices.net.outcome import ALLOW, DENY, HOLDS, SLOTS
from rayos_devices.net.port import EchoPort
from rayos_devices.net.wire import HEADER_BYTES
from tests.framework.target import Rig, Stepped

MAC, OTHER = b"\x02\0\0\0\0\x02", b"\x02\0\0\0\0\x01"
HEADER = bytes(HEADER_BYTES)
#: Pieces of a receive chain of 2 KiB: the plain one, and those that a frame has to be led into by the general path.
SHAPES = ([2048], [12, 2036], [11, 2037], [100, 100, 1848], [1] * 20 + [2028])
DENIED_PORT = 7


class Bouncer:
    """Lets everything out, and in what is not for DENIED_PORT."""

    def __init__(self) -> None:
        self.mac = MAC
        self.epoch = memoryview(array("Q", [1]))
        self.page = memoryview(array("Q", [0]))
        self.hits = memoryview(array("Q", bytes(8 * SLOTS)))
        self.answers: deque[tuple[bool, bytes]] = deque()

    def judge(self, frame: bytes, is_outgoing: bool, now: float) -> int:
        is_denied = not is_outgoing and frame[36:38] == struct.pack(">H", DENIED_PORT)
        return (DENY if is_denied else ALLOW) | HOLDS

    def snapshot(self) -> dict[str, Any]:
        return {}


def udp(port: int, body: bytes) -> bytes:
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, 28 + len(body), 0, 0, 64, 17, 0, 0x0A000002, 0x0A000001)
    return OTHER + MAC + b"\x08\0" + ip + struct.pack("!HHHH", 1000, port, 8 + len(body), 0) + body


def echoed(frame: bytes) -> bytes:
    return frame[6:12] + frame[:6] + frame[12:]


class Echo:
    """A device whose guest hears itself, and what it has heard."""

    def __init__(self, judge: Judge | None = None, rate: float | None = None) -> None:
        self.target = Stepped(
            lambda loop: NetBackend("net", loop, EchoPort(), judge=judge, rate_bytes_per_second=rate)
        )
        self.rig = Rig(self.target, 2)
        self.heard: list[bytes] = []
        self._rooms: dict[int, list[tuple[int, int]]] = {}

    def offer(self, lengths: list[int]) -> None:
        places = [(self.rig.ram.allocate(length), length) for length in lengths]
        self._rooms[self.rig.queues[RX].submit((), places)] = places

    def send(self, frame: bytes, *cuts: int) -> None:
        data = HEADER + frame
        at = self.rig.ram.put(data)
        ends = [*cuts, len(data)]
        self.rig.queues[TX].submit(
            [(at + start, end - start) for start, end in zip([0, *cuts], ends, strict=True)]
        )

    def listen(self) -> None:
        self.rig.settle()
        self.rig.queues[TX].collect()
        for head, written in self.rig.queues[RX].collect():
            data = b"".join(self.rig.ram.read(at, length) for at, length in self._rooms.pop(head))[:written]
            assert data[10:HEADER_BYTES] == b"\1\0"  # num_buffers
            self.heard.append(data[HEADER_BYTES:])

    @property
    def counts(self) -> tuple[int, int, dict[str, int]]:
        found = self.target.backend.snapshot()
        sent, received = (found["operations"][name]["allowed"] for name in ("net.tx", "net.rx"))
        return sent, received, found["denials"]

    def close(self) -> None:
        self.rig.close()
        self.target.close()

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.mark.parametrize("is_judged", [False, True])
@pytest.mark.parametrize("rate", [None, 1e9])
def test_frames_come_whole_and_in_order(is_judged: bool, rate: float | None) -> None:
    """Of every size, from and into every shape of chain, whether there is a chain at the time or not."""
    chance = random.Random(11)
    expected: list[bytes] = []
    sent = refused = 0
    with Echo(Bouncer() if is_judged else None, rate) as echo:
        heap = echo.rig.ram.allocate(0)
        for turn in range(60):
            for _ in range(chance.randrange(8)):
                echo.offer(chance.choice(SHAPES))
            for _ in range(chance.randrange(8)):
                port = chance.choice((DENIED_PORT, 8, 9))
                frame = udp(
                    port, bytes([turn]) + chance.randbytes(chance.choice((0, 20, 200, 240, 400, 1400)))
                )
                echo.send(frame, *sorted(chance.sample(range(1, len(frame)), chance.randrange(4))))
                sent += 1
                if is_judged and port == DENIED_PORT:
                    refused += 1
                else:
                    expected.append(echoed(frame))
            echo.listen()
            assert echo.heard == expected[: len(echo.heard)]
            if turn % 10 == 9:
                while len(echo.heard) < len(expected):
                    echo.offer([2048])
                    echo.listen()
                while echo._rooms:  # so that the memory is ours again
                    frame = udp(9, bytes([turn]))
                    echo.send(frame)
                    sent += 1
                    expected.append(echoed(frame))
                    echo.listen()
                echo.rig.ram.rewind(heap)
        assert echo.heard == expected and len(expected) > 200
        assert echo.counts == (sent, len(expected), {"firewall": refused} if refused else {})
        assert bool(refused) == is_judged


def test_a_refused_frame_never_is_in_guest_memory() -> None:
    with Echo(Bouncer()) as echo:
        room = echo.rig.ram.put(b"\xee" * 2048)
        echo.rig.queues[RX].submit((), [(room, 2048)])
        for size in (10, 1400):
            echo.send(udp(DENIED_PORT, bytes(size)))
            echo.listen()
        assert echo.rig.ram.read(room, 2048) == b"\xee" * 2048
        assert echo.counts == (2, 0, {"firewall": 2})


def test_a_slow_receiver_gets_all_in_its_time() -> None:
    """Frames beyond the rate wait, and later frames wait behind them."""
    frames = [udp(9, bytes([number]) * 1400) for number in range(40)]
    with Echo(rate=1e6) as echo:
        for _ in frames:
            echo.offer([2048])
        for frame in frames:
            echo.send(frame)
        while len(echo.heard) < len(frames):
            echo.listen()
        assert echo.heard == [echoed(frame) for frame in frames]
        assert echo.counts == (40, 40, {})


def test_a_broken_receive_ring_is_no_fault_of_the_sender() -> None:
    """It is latched and told; the transmit queue goes on."""
    with Echo() as echo:
        echo.rig.queues[RX].set_avail_index(300)
        for _ in range(3):
            echo.send(udp(9, b"out"))
            echo.listen()
        receiving, sending = (queue["broken"] for queue in echo.target.backend.snapshot()["queues"])
        assert "avail index jumped by 300" in receiving and sending == ""
        assert echo.rig.queues[RX].has_error()
        assert echo.counts[:2] == (3, 0)


def test_who_watches_sees_what_is_received() -> None:
    """A capture stands before the port: frames go by way of it, and right in again when it has ended."""
    with Echo() as echo:
        net = echo.target.backend
        assert isinstance(net, NetBackend)
        capture = net.start_capture(100, lambda: None)
        for _ in range(2):
            echo.offer([2048])
            echo.send(udp(9, b"seen"))
            echo.listen()
        assert (capture.seen, len(echo.heard)) == (4, 2)
        net.stop_capture()
        echo.offer([2048])
        echo.send(udp(9, b"unseen"))
        echo.listen()
        assert (capture.seen, len(echo.heard)) == (4, 3)

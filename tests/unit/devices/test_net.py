"""The network device with several pairs of queues, and two of them joined without a tap."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from devices.net.backend import NetBackend
from devices.net.port import EchoPort, SinkPort
from devices.net.wire import HEADER_BYTES, NetFeature
from devices.vhost_user.message import Request
from tests.framework.frontend import Frontend
from tests.framework.target import Rig, Served, Stepped

HEADER = bytes(HEADER_BYTES)
FRAME = b"\x02\0\0\0\0\x01" + b"\x02\0\0\0\0\x02" + b"\x08\x00" + bytes(range(50))
BUFFER_BYTES = 2048


class Switch(SinkPort):
    """Remembers whether its pair of queues is served."""

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = False

    def set_enabled(self, enabled: bool) -> None:
        self.is_enabled = enabled


class Door:
    """Another socket of a process that a `Served` looks after."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def connect(self) -> Frontend:
        return Frontend.connect(self._path)

    def settle(self) -> None:
        time.sleep(0.002)

    def close(self) -> None:
        pass


def receive(rig: Rig, queue: int) -> bytes:
    """A buffer for a frame on a receive queue, and the frame."""
    room = rig.ram.allocate(BUFFER_BYTES)
    rig.queues[queue].submit([], [(room, BUFFER_BYTES)])
    ((_, size),) = rig.wait_used(queue)
    return rig.ram.read(room + HEADER_BYTES, size - HEADER_BYTES)


def test_every_pair_has_its_own_port() -> None:
    """What leaves by a pair comes back by it; the counters are of all."""
    with Stepped(lambda loop: NetBackend("net", loop, *(EchoPort() for _ in range(3)))) as target:
        with Rig(target, 6) as rig:
            assert rig.offered & NetFeature.MQ
            assert rig.frontend.ask_u64(Request.GET_QUEUE_NUM) == 3
            for pair in (2, 0, 1):
                frame = FRAME + bytes([pair])
                rig.request(HEADER + frame, index=2 * pair + 1)
                echoed = receive(rig, 2 * pair)
                assert echoed == frame[6:12] + frame[:6] + frame[12:]
            counted = target.backend.snapshot()["operations"]
            assert (counted["net.tx"]["allowed"], counted["net.rx"]["allowed"]) == (3, 3)


def test_a_pair_that_is_not_served_is_taken_out_of_the_network() -> None:
    """The driver's choice of pairs arrives as SET_VRING_ENABLE: the port knows."""
    ports = [Switch(), Switch()]
    with Stepped(lambda loop: NetBackend("net", loop, *ports)) as target:
        with Rig(target, 4) as rig:
            rig.settle()
            assert [port.is_enabled for port in ports] == [True, True]
            rig.frontend.enable(2, 0)
            rig.frontend.enable(3, 0)
            assert [port.is_enabled for port in ports] == [True, False]
            rig.frontend.enable(2)
            assert ports[1].is_enabled
        assert not any(port.is_enabled for port in ports)


def test_one_pair_is_no_multiqueue() -> None:
    with Stepped(lambda loop: NetBackend("net", loop, EchoPort())) as target, Rig(target, 2) as rig:
        assert not rig.offered & NetFeature.MQ


def test_two_guests_are_joined_by_one_process(tmp_path: Path) -> None:
    """`devices.serve net --join`: a frame of one guest is in the other's memory, both ways, and after one left."""
    first, second = tmp_path / "one.sock", tmp_path / "other.sock"
    command = [sys.executable, "-P", "-m", "devices.serve", "net", "--socket", first, "--join", second]
    with Served(second, command=command) as target:
        target.connect().close()  # the first socket was there before it
        with Rig(Door(first), 2) as one:
            for turn in range(2):
                with Rig(target, 2) as other:
                    assert (one.request(HEADER + FRAME, index=1), receive(other, 0)) == (b"", FRAME)
                    back = FRAME[::-1] + bytes([turn])
                    assert (other.request(HEADER + back, index=1), receive(one, 0)) == (b"", back)

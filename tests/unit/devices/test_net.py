"""The network device with several pairs of queues, and two of them joined without a tap."""

from __future__ import annotations

import os
import random
import struct
import sys
import time
from pathlib import Path

import pytest

from rayos_devices.errors import RequestError
from rayos_devices.native import Buffers, address_of
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.capture import Capture
from rayos_devices.net.port import EchoPort, SinkPort
from rayos_devices.net.wire import HEADER_BYTES, NetFeature
from rayos_devices.vhost_user.message import FrontendRequest
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
    """Frames that leave by a pair come back by it; the counters are of all."""
    with Stepped(lambda loop: NetBackend("net", loop, *(EchoPort() for _ in range(3)))) as target:
        with Rig(target, 6) as rig:
            assert rig.offered & NetFeature.MQ
            assert rig.frontend.ask_u64(FrontendRequest.GET_QUEUE_NUM) == 3
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
    """`rayos_devices.serve net --join`: a frame of one guest is in the other's memory, both ways."""
    first, second = tmp_path / "one.sock", tmp_path / "other.sock"
    command: list[str | Path] = [sys.executable, "-P", "-m", "rayos_devices.serve", "net"]
    command += ["--socket", first, "--join", second]
    with Served(second, command=command) as target:
        target.connect().close()  # the first socket was there before it
        with Rig(Door(first), 2) as one:
            for turn in range(2):
                with Rig(target, 2) as other:
                    assert (one.request(HEADER + FRAME, index=1), receive(other, 0)) == (b"", FRAME)
                    back = FRAME[::-1] + bytes([turn])
                    assert (other.request(HEADER + back, index=1), receive(one, 0)) == (b"", back)


def captured(data: bytes) -> list[tuple[int, int, bytes]]:
    """Length, direction and kept bytes of each record."""
    found = []
    while data:
        _, kept, length, direction = struct.unpack_from("<QIIQ", data)
        found.append((length, direction, data[24 : 24 + kept]))
        data = data[24 + (kept + 7 & ~7) :]
    return found


def test_a_capture_sees_both_directions_and_costs_nothing_afterwards() -> None:
    """A capture has both directions, without the virtio header, cut to the snap length; then the port's own path is
    back.
    """
    told: list[int] = []
    with Stepped(lambda loop: NetBackend("net", loop, EchoPort())) as target, Rig(target, 2) as rig:
        net = target.backend
        paths = [ring.path for ring in net._rings]
        rig.request(HEADER + FRAME, index=1)
        receive(rig, 0)
        capture = net.start_capture(20, lambda: told.append(1))
        with pytest.raises(RequestError, match="captured already"):
            net.start_capture(20, lambda: None)
        assert capture.read(1 << 16) == b""
        capture.ask()
        for _ in range(2):
            rig.request(HEADER + FRAME, index=1)
            receive(rig, 0)
        echoed = FRAME[6:12] + FRAME[:6] + FRAME[12:]
        both = [(len(FRAME), 2, FRAME[:20]), (len(FRAME), 1, echoed[:20])]
        assert told == [1]
        assert captured(capture.read(60)) + captured(capture.read(1 << 16)) == both * 2
        assert (capture.seen, capture.dropped) == (4, 0)
        net.stop_capture()
        assert [ring.path for ring in net._rings] == paths
        rig.request(HEADER + FRAME, index=1)
        assert capture.seen == 4


@pytest.mark.parametrize("snap", [0, -1, 65_489])
def test_a_snap_length_out_of_range_is_refused(snap: int) -> None:
    with Stepped(lambda loop: NetBackend("net", loop, SinkPort())) as target:
        with pytest.raises(RequestError, match=r"1 to 65488 are allowed"):
            target.backend.start_capture(snap, lambda: None)


def test_a_capture_that_nobody_reads_drops_and_counts() -> None:
    """Its memory is bounded; what is kept is whole and in order, also when it is read in pieces in between."""
    capture = Capture(65_488, lambda: None)
    chance = random.Random(9)
    frames: list[bytes] = []
    kept: list[bytes] = []
    for _ in range(400):
        frame = bytearray(HEADER + os.urandom(8) + bytes(chance.choice([52, 1506, 65_480])))
        buffers = Buffers()
        buffers.add(address_of(frame), 30)
        buffers.add(address_of(frame) + 30, len(frame) - 30)
        before = capture.dropped
        capture.take(buffers, len(frame), 1)
        if capture.dropped == before:
            frames.append(bytes(frame[HEADER_BYTES:]))
        if chance.random() < 0.3:
            kept += [data for _, _, data in captured(capture.read(1 << 16))]
    while data := capture.read(1 << 16):
        kept += [one for _, _, one in captured(data)]
    assert kept == frames
    assert (capture.seen, capture.dropped) == (400, 400 - len(frames))
    assert capture.dropped > 0

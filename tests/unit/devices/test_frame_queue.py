"""Frames inside a process: first in, first out, the oldest given up, and two ports that are each other's network."""

from __future__ import annotations

import os
import random
from collections import deque

from rayos_devices.native import Buffers, address_of
from rayos_devices.net.outcome import EMPTY
from rayos_devices.net.port import EchoPort, join_ports
from rayos_devices.net.queue import FrameQueue

ROOM = 70_000


def buffers(data: bytearray, *lengths: int) -> Buffers:
    """`data`, which the caller keeps, as buffers of these lengths."""
    out, at = Buffers(), address_of(data)
    for length in lengths or (len(data),):
        assert out.add(at, length)
        at += length
    return out


def test_frames_come_out_as_they_went_in_and_the_oldest_are_lost() -> None:
    """Against a deque, with sizes that wrap around the memory at every place."""
    queue = FrameQueue()
    model: deque[bytes] = deque()
    chance = random.Random(7)
    into = bytearray(ROOM)
    try:
        for turn in range(6000):
            if chance.random() < 0.6:
                frame = bytearray(os.urandom(8) + bytes(chance.choice([18, 52, 1500, 65_000])))
                before = queue.lost
                assert queue.push(buffers(frame, 3, len(frame) - 3)) == len(frame)
                model.append(bytes(frame))
                for _ in range(queue.lost - before):
                    model.popleft()
            else:
                size = queue.pop(buffers(into, 5, ROOM - 5))
                assert bytes(into[:size]) == (model.popleft() if model else b""), turn
        assert queue.lost > 0
        while model:
            size = queue.pop(buffers(into))
            assert bytes(into[:size]) == model.popleft()
        assert queue.pop(buffers(into)) == 0
    finally:
        queue.close()


def test_two_joined_ports_are_each_others_network() -> None:
    """Both ways, untouched, and nothing comes back to its sender."""
    one, other = join_ports()
    sender, receiver = one.path(), other.path()
    into = bytearray(ROOM)
    try:
        frame = bytearray(12) + bytearray(b"frame from here")
        assert sender.send(buffers(frame)) == len(frame)
        assert sender.receive(buffers(into)) == EMPTY
        assert receiver.receive(buffers(into)) == len(frame)
        assert into[: len(frame)] == frame
        assert receiver.receive(buffers(into)) == EMPTY
        receiver.send(buffers(frame))
        assert sender.receive(buffers(into)) == len(frame)
    finally:
        one.close()
        other.close()


def test_the_echo_swaps_the_addresses() -> None:
    port = EchoPort()
    path = port.path()
    into = bytearray(ROOM)
    try:
        frame = bytearray(bytes(12) + b"AAAAAABBBBBB" + b"\x08\x00rest")
        path.send(buffers(frame))
        assert path.receive(buffers(into)) == 30
        assert bytes(into[12:30]) == b"BBBBBBAAAAAA\x08\x00rest"
    finally:
        port.close()

"""Frames of QEMU's `-netdev stream` through the network device: in pieces, shaped, judged and lost as any other."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayos_devices.errors import ProtocolError
from rayos_devices.faults import Fault, Faults
from rayos_devices.loop import Loop
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.port import EchoPort
from rayos_devices.net.stream import Frames, StreamPort

TO, FROM = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"


def framed(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def test_frames_are_cut_out_of_the_stream() -> None:
    """In any pieces; a length that QEMU never sends is not waited for."""
    frames, wire = Frames(), framed(b"one") + framed(b"") + framed(b"three")
    found = []
    for at in range(len(wire)):
        frames.add(wire[at : at + 1])
        if (frame := frames.take()) is not None:
            found.append(frame)
    assert found == [b"one", b"", b"three"]
    frames.add(struct.pack(">I", 69633))
    with pytest.raises(ProtocolError, match="at most 69632"):
        frames.take()


class Card:
    """A card whose network sends every frame back, in a thread of its own."""

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        self.backend = NetBackend("net", self.loop, EchoPort())
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(directory / "s"))
        self._listening.listen(1)
        self.port = StreamPort(self.backend, self._listening, self.loop)
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()
        self._path = str(directory / "s")

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(self._path)
        return sock

    def close(self) -> None:
        self.loop.stop()
        self._thread.join()
        self.port.close()
        self.backend.close()
        self._listening.close()


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    card = Card(tmp_path)
    yield card
    card.close()


def exact(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, data
        data += piece
    return data


def test_every_frame_comes_back_also_to_who_connects_again(card: Card) -> None:
    """More frames than the rings hold, of all sizes, two VLAN tags on the longest; what is longer is lost."""
    for _ in range(2):
        with card.connect() as sock:
            for start in range(14, 1523, 150):
                sizes = range(start, min(start + 150, 1523))
                wire = b"".join(framed(TO + FROM + bytes([size & 255]) * (size - 12)) for size in sizes)
                sock.sendall(wire + framed(bytes(1523)))
                for size in sizes:
                    assert struct.unpack(">I", exact(sock, 4))[0] == max(size, 60)
                    whole = FROM + TO + bytes([size & 255]) * (size - 12)
                    assert exact(sock, max(size, 60)) == whole.ljust(60, b"\0")
    assert card.port.too_long >= 11
    operations = card.backend.snapshot()["operations"]
    assert operations["net.tx"]["allowed"] == operations["net.rx"]["allowed"] == 2 * 1509


def test_faults_strike_it_and_rubbish_ends_its_connection_alone(card: Card) -> None:
    """The device is the one that every other guest has; who breaks the stream is dropped and may come back."""
    card.loop.call_soon(
        lambda: card.backend.set_faults(Faults([Fault(op="tx", action="drop", every=2)], seed=0))
    )
    with card.connect() as sock:
        for number in range(4):
            sock.sendall(framed(TO + FROM + bytes([number] * 60)))
        assert [exact(sock, 76)[-1], exact(sock, 76)[-1]] in ([0, 2], [1, 3])
        sock.sendall(b"\xff" * 64)
        assert sock.recv(1) == b""
    with card.connect() as sock:
        sock.sendall(2 * framed(TO + FROM + bytes(60)))
        assert len(exact(sock, 76)) == 76

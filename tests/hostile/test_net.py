"""Frames and receive buffers of a hostile guest (rows N1 to N4 of the threat model).

N5, firewall bypass, is in `test_net_filter.py`: no frame is looked into here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from rayos_devices.net.backend import RX, TX, NetBackend
from rayos_devices.net.wire import HEADER_BYTES, MAX_FRAME_BYTES, NetFeature
from rayos_devices.vhost_user.message import VRING_STATE, FrontendRequest
from rayos_devices.virtio.features import TRANSPORT_FEATURES
from tests.framework.controlled import RealNet, TapWire, other_side, tapped_card
from tests.framework.driver import DESC_F_WRITE
from tests.framework.hostile import DEVICES
from tests.framework.kept import Kept
from tests.framework.target import Rig, Stepped
from tests.framework.wire import Wire

HEADER = bytes(HEADER_BYTES)
FRAME = b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x01" + b"\x08\x00" + bytes(46)


Target = Stepped[NetBackend] | RealNet
AnyWire = Wire | TapWire


@pytest.fixture(scope="module")
def tap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kept, TapWire]]:
    """A sandboxed worker with a network card, and the other side of its tap, for all cases."""
    with tapped_card(tmp_path_factory.mktemp("net")) as card:
        yield card


@pytest.fixture
def real(tap: tuple[Kept, TapWire]) -> Iterator[RealNet]:
    with RealNet(tap[0]) as target:
        yield target


@pytest.fixture(params=["stepped", "served"])
def net(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A card in this process, or the real worker's."""
    if request.param == "served":
        yield request.getfixturevalue("real")
        return
    with Stepped(lambda loop: NetBackend("net", loop, Wire())) as target:
        yield target


@pytest.fixture
def wire(request: pytest.FixtureRequest, net: Target) -> AnyWire:
    """The card's other side."""
    return other_side(net, request)


@pytest.fixture
def rig(net: Target) -> Iterator[Rig]:
    with Rig(net, 2) as rig:
        yield rig
        DEVICES["net"].honest(rig)
        assert not any(queue.has_error() for queue in rig.queues)


def denials(rig: Rig) -> dict[str, Any]:
    assert isinstance(rig.target, Stepped | RealNet)
    found = rig.target.backend.snapshot()["denials"]
    assert isinstance(found, dict)
    return {reason: count for reason, count in found.items() if count}


# -- N1: frames that are none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, 11, 12, 13, 12 + 13, HEADER_BYTES + MAX_FRAME_BYTES + 1, 1 << 17, 1 << 20]
)
def test_N1_a_frame_too_short_or_too_long_is_dropped(rig: Rig, wire: AnyWire, size: int) -> None:
    """Without an Ethernet header, or above 64 KiB: counted, nothing leaves, and the buffer comes back."""
    source = rig.ram.allocate(max(size, 1))
    head = rig.queues[TX].submit([(source, size)])
    assert rig.wait_used(TX) == [(head, 0)]
    assert wire.sent == []
    assert denials(rig) == {"invalid": 1}


@pytest.mark.parametrize("size", [14, 60, 1514, MAX_FRAME_BYTES])
def test_N1_the_boundaries_from_their_other_side(rig: Rig, wire: AnyWire, size: int) -> None:
    """The shortest and the longest frame leave as they are."""
    source = rig.ram.put(HEADER + b"f" * size)
    rig.queues[TX].submit([(source, HEADER_BYTES + size)])
    rig.wait_used(TX)
    assert wire.sent == [HEADER + b"f" * size]


@pytest.mark.parametrize("pieces", [2, 11, 12, 13, 100, 1024])
def test_N1_a_frame_in_many_pieces_leaves_whole(rig: Rig, wire: AnyWire, pieces: int) -> None:
    """CVE-2022-2132: a header over several descriptors, a frame in 1-byte ones."""
    data = (HEADER + FRAME + bytes(1024))[: max(pieces, 26)]
    source = rig.ram.put(data)
    buffers = [(source + i, 1) for i in range(pieces - 1)] + [(source + pieces - 1, len(data) - pieces + 1)]
    rig.queues[TX].submit(buffers, indirect=True)
    rig.wait_used(TX)
    assert wire.sent == [data]


def test_N1_a_writable_transmit_buffer_is_not_sent(rig: Rig, wire: AnyWire) -> None:
    """A buffer marked for writing is no frame; nothing is written to it either."""
    room = rig.ram.put(b"\xee" * 128)
    head = rig.queues[TX].submit((), [(room, 128)])
    assert rig.wait_used(TX) == [(head, 0)]
    assert (wire.sent, rig.ram.read(room, 128)) == ([], b"\xee" * 128)


# -- N2: offload fields ----------------------------------------------------------------------------------------------

#: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
BAD_OFFLOADS = {
    "gso size 0": (1, 1, 54, 0, 34, 16),
    "unknown gso type": (1, 0x7F, 54, 1000, 34, 16),
    "header longer than the frame": (0, 1, 0xFFFF, 1000, 0, 0),
    "checksum starts behind the frame": (1, 0, 0, 0, 0xFFFF, 16),
    "checksum lies behind the frame": (1, 0, 0, 0, 34, 0xFFFF),
    "checksum at the last byte": (1, 0, 0, 0, 59, 0),
}


@pytest.mark.parametrize("net", ["served"], indirect=True)
@pytest.mark.parametrize("case", BAD_OFFLOADS)
def test_N2_offload_fields_that_cannot_be(rig: Rig, wire: AnyWire, case: str) -> None:
    """A tap refuses them: the frame is dropped and counted, and the next one passes (CVE-2024-11614)."""
    data = struct.pack("<BBHHHH", *BAD_OFFLOADS[case]) + b"\0\0" + FRAME
    head = rig.queues[TX].submit([(rig.ram.put(data), len(data))])
    assert rig.wait_used(TX) == [(head, 0)]
    assert denials(rig) == {"io_error": 1}
    rig.queues[TX].submit([(rig.ram.put(HEADER + FRAME), HEADER_BYTES + len(FRAME))])
    rig.wait_used(TX)
    assert denials(rig) == {"io_error": 1}
    assert wire.sent == [HEADER + FRAME]


# -- N3: the control queue -------------------------------------------------------------------------------------------


def test_N3_there_is_no_control_queue(net: Target) -> None:
    """Neither CTRL_VQ nor MQ is offered, and a third queue is class P."""
    with Rig(net, 2) as rig:
        assert not rig.offered & (1 << 17 | 1 << 22)
        rig.frontend.send(FrontendRequest.SET_VRING_ENABLE, VRING_STATE.pack(2, 1))
        assert rig.frontend.is_dropped()
    with Rig(net, 2) as rig:
        DEVICES["net"].honest(rig)


# -- N4: receive buffers ---------------------------------------------------------------------------------------------


def offer(rig: Rig, *lengths: int) -> list[tuple[int, int, int]]:
    """A receive buffer of each length; head, address, length of each."""
    out = []
    for length in lengths:
        address = rig.ram.put(b"\xee" * (length + 64))
        out.append((rig.queues[RX].add((), [(address, length)]), address, length))
    rig.queues[RX].offer([head for head, _, _ in out])
    rig.queues[RX].kick(always=True)
    rig.settle()
    return out


def assert_untouched_behind(rig: Rig, buffers: list[tuple[int, int, int]]) -> None:
    for _, address, length in buffers:
        assert rig.ram.read(address + length, 64) == b"\xee" * 64


@pytest.mark.parametrize("lengths", [(1,), (11,), (12,), (13,), (71,), (1, 1, 1), (12, 12, 12)], ids=str)
def test_N4_too_little_room_drops_the_frame(rig: Rig, wire: AnyWire, lengths: tuple[int, ...]) -> None:
    """Counted; no byte behind a buffer is touched, and the buffers wait for a frame that fits."""
    buffers = offer(rig, *lengths)
    wire.arrive(HEADER + FRAME)
    rig.settle()
    assert rig.queues[RX].collect() == []
    assert sum(denials(rig).values()) == 1
    assert_untouched_behind(rig, buffers)


def test_N4_no_buffers_at_all_keeps_the_frames_in_the_port(rig: Rig, wire: AnyWire) -> None:
    """Nothing is read for which there is no room, and nothing spins; buffers later get them all."""
    wire.arrive(*[HEADER + FRAME] * 5)
    for _ in range(10):
        rig.settle()
    assert isinstance(wire, TapWire) or len(wire.incoming) == 5
    assert denials(rig) == {}
    offer(rig, *[2048] * 5)
    assert [written for _, written in rig.wait_used(RX, 5)] == [HEADER_BYTES + len(FRAME)] * 5


def test_N4_a_frame_over_many_tiny_buffers_is_whole(rig: Rig, wire: AnyWire) -> None:
    """Mergeable: num_buffers says how many, and each holds what its used length says."""
    buffers = offer(rig, 12, *[1] * 60)
    data = HEADER + bytes(range(60))
    wire.arrive(data)
    used = rig.wait_used(RX, 61)
    assert [head for head, _ in used] == [head for head, _, _ in buffers]
    assert [written for _, written in used] == [12] + [1] * 60
    joined = b"".join(rig.ram.read(address, length) for _, address, length in buffers)
    assert joined == data[:10] + (61).to_bytes(2, "little") + data[12:]
    assert_untouched_behind(rig, buffers)


def test_N4_the_longest_frame_over_every_buffer(rig: Rig, wire: AnyWire) -> None:
    """As many buffers as the queue has: num_buffers does not wrap, and one more byte is a dropped frame."""
    buffers = offer(rig, *[260] * 256)
    wire.arrive(HEADER + bytes(wire.longest))
    used = rig.wait_used(RX, 253)
    assert len(used) == -(-(HEADER_BYTES + wire.longest) // 260)
    assert rig.ram.read(buffers[0][1] + 10, 2) == len(used).to_bytes(2, "little")


def test_N4_without_mergeable_buffers_a_frame_takes_one(net: Target, wire: AnyWire) -> None:
    """Never cut, never spread over the next chain."""
    features = int(TRANSPORT_FEATURES | NetFeature.CSUM)
    with Rig(net, 2, features=features) as rig:
        buffers = offer(rig, 40, 2048)
        wire.arrive(HEADER + FRAME)
        rig.settle()
        assert rig.queues[RX].collect() == []
        assert denials(rig) == {"queue_full": 1}
        assert rig.ram.read(buffers[1][1], 2048) == b"\xee" * 2048


def test_N4_a_readable_receive_buffer_holds_nothing(rig: Rig, wire: AnyWire) -> None:
    """The driver offered what cannot be written: frames are dropped, its bytes stay."""
    source = rig.ram.put(b"\xee" * 2048)
    rig.queues[RX].submit([(source, 2048)])
    rig.settle()
    wire.arrive(HEADER + FRAME)
    rig.settle()
    assert rig.ram.read(source, 2048) == b"\xee" * 2048


def test_N4_a_bad_chain_among_those_of_one_frame_loses_no_other(rig: Rig, wire: AnyWire) -> None:
    """The bad one comes back unused; the good ones around it are used or come back, each once."""
    queue = rig.queues[RX]
    first = queue.add((), [(rig.ram.allocate(32), 32)])
    bad = queue.add((), [(rig.ram.end, 1)])
    second = queue.add((), [(rig.ram.allocate(8), 8)])
    queue.offer([first, bad, second])
    queue.kick(always=True)
    rig.settle()
    wire.arrive(HEADER + FRAME)
    rig.settle()
    entries = queue.collect()
    assert sorted(head for head, _ in entries) == sorted([first, bad, second])
    assert {written for _, written in entries} == {0}
    offer(rig, 2048)
    wire.arrive(HEADER + FRAME)
    assert rig.wait_used(RX)[0][1] == HEADER_BYTES + len(FRAME)


@pytest.mark.parametrize("net", ["stepped"], indirect=True)
def test_N4_what_arrives_short_is_dropped(rig: Rig, wire: AnyWire) -> None:
    """A port that delivers less than an Ethernet header."""
    offer(rig, 2048)
    wire.arrive(HEADER + b"short", HEADER + FRAME)
    assert [written for _, written in rig.wait_used(RX)] == [HEADER_BYTES + len(FRAME)]
    assert denials(rig) == {"invalid": 1}


def test_N1_N4_floods_leave_a_card_that_works(rig: Rig, wire: AnyWire) -> None:
    """A thousand bad frames and buffers, then good ones both ways."""
    queue = rig.queues[TX]
    for turn in range(20):
        rig.ram.rewind(rig.heap)
        heads = [queue.add([(rig.ram.allocate(64), turn % 26)]) for _ in range(25)]
        heads += [queue.add((), [(rig.ram.allocate(64), 64)]) for _ in range(25)]
        queue.offer(heads)
        queue.kick(always=True)
        assert len(rig.wait_used(TX, 50)) == 50
    assert wire.sent == []
    queue = rig.queues[RX]
    queue.set_descriptor(200, rig.ram.end, 64, DESC_F_WRITE)
    queue.offer([200])
    room = rig.ram.allocate(2048)
    head = queue.submit((), [(room, 2048)])
    assert rig.wait_used(RX) == [(200, 0)]
    DEVICES["net"].honest(rig)
    assert len(wire.sent) == 1
    wire.arrive(HEADER + FRAME)
    assert rig.wait_used(RX)[0][0] == head

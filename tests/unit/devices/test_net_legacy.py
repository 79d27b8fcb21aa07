"""The 10-byte header of a driver that acked neither VERSION_1 nor MRG_RXBUF (VIRTIO 1.3, 5.1.6.1)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

import pytest

from rayos_devices.backend import Backend
from rayos_devices.loop import Loop
from rayos_devices.native import Buffers, address_of
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.outcome import DENY, HOLDS, MALFORMED, SLOT_SHIFT
from rayos_devices.net.port import EchoPort, join_ports
from rayos_devices.net.wire import HEADER_BYTES, LEGACY_HEADER_BYTES, NetFeature
from rayos_devices.vhost_user.message import U64, FrontendRequest
from rayos_devices.virtio.features import Feature
from rayos_devices.virtio.layout import MAX_BUFFERS
from tests.framework.hostile import offering_packed
from tests.framework.target import Rig, Stepped
from tests.framework.wire import Wire
from tests.unit.devices.test_net_filter import MAC, OTHER, Judge, udp4

LEGACY = Feature.PROTOCOL_FEATURES | Feature.INDIRECT_DESC
FRAME = OTHER + MAC + b"\x88\xb5" + bytes(range(200))
#: flags and gso_type 0, the rest as no port may see it changed: hdr_len, gso_size, csum_start, csum_offset.
HEAD10 = struct.pack("<BBHHHH", 0, 0, 1, 2, 3, 4)
on_both_rings = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
on_both_sides = pytest.mark.parametrize("judged", [False, True], ids=["open", "judged"])


class Card:
    """A card between a driver with these features and a wire."""

    def __init__(self, *, features: int = LEGACY, packed: bool = False, judge: Judge | None = None) -> None:
        self.wire = Wire()

        def make(loop: Loop) -> Backend:
            return offering_packed(NetBackend("net", loop, self.wire, judge=judge))

        self.target = Stepped(make)
        features |= Feature.RING_PACKED if packed else 0
        self.rig = Rig(self.target, 2, features=features, event_idx=False, packed=packed)

    def send(self, pieces: Sequence[bytes], *, indirect: bool = False) -> bytes:
        """The frame that the wire has of one whose header and data are in these pieces."""
        buffers = [(self.rig.ram.put(piece), len(piece)) for piece in pieces]
        self.rig.queues[1].submit(buffers, indirect=indirect)
        assert [size for _, size in self.rig.wait_used(1)] == [0]
        return self.wire.sent.pop() if self.wire.sent else b""

    def receive(self, data: bytes, *sizes: int, indirect: bool = False) -> bytes:
        """The bytes that a driver has of a frame that comes, with its header, in buffers of these sizes."""
        rooms = [(self.rig.ram.put(b"\xee" * size), size) for size in sizes]
        self.rig.queues[0].submit([], rooms, indirect=indirect)
        self.wire.arrive(data)
        ((_, written),) = self.rig.wait_used(0)
        whole = b"".join(self.rig.ram.read(address, size) for address, size in rooms)
        assert whole[written:] == b"\xee" * (len(whole) - written)
        return whole[:written]

    def __enter__(self) -> Card:
        return self

    def __exit__(self, *_: object) -> None:
        self.rig.close()
        self.target.close()


def pieces_of(data: bytes, *cuts: int) -> list[bytes]:
    return [data[start:end] for start, end in pairwise((0, *cuts, len(data)))]


@on_both_rings
@pytest.mark.parametrize(
    ("features", "size"),
    [
        (0, LEGACY_HEADER_BYTES),
        (NetFeature.CSUM | NetFeature.GUEST_CSUM | Feature.ANY_LAYOUT, LEGACY_HEADER_BYTES),
        (NetFeature.MRG_RXBUF, HEADER_BYTES),
        (Feature.VERSION_1, HEADER_BYTES),
        (Feature.VERSION_1 | NetFeature.MRG_RXBUF, HEADER_BYTES),
    ],
)
def test_the_features_decide_how_long_the_header_is(features: int, size: int, packed: bool) -> None:
    """Either of the two makes it 12 bytes; `num_buffers` is 1 then, and else there is none."""
    with Card(features=LEGACY | features, packed=packed) as card:
        head = HEAD10.ljust(size, b"\0")
        assert card.send([head, FRAME]) == HEAD10 + b"\0\0" + FRAME
        got = card.receive(HEAD10 + b"\0\0" + FRAME, size, 1600)
        assert got == HEAD10 + (b"\1\0" if size == HEADER_BYTES else b"") + FRAME


SHAPES = {
    "header alone": (10,),
    "all in one": (),
    "header and some data": (60,),
    "header in three": (1, 4),
    "cut in the header": (9,),
    "cut behind the address": (16,),
    "ten pieces": tuple(range(10, 200, 20)),
    "as many as there may be": tuple(range(1, MAX_BUFFERS)),
}


@on_both_sides
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("cuts", SHAPES.values(), ids=SHAPES.keys())
def test_a_legacy_driver_cuts_its_buffers_anywhere(
    cuts: tuple[int, ...], indirect: bool, judged: bool
) -> None:
    """ANY_LAYOUT; the iovec with no room for two more takes the long way."""
    with Card(judge=Judge() if judged else None) as card:
        data = HEAD10 + FRAME
        assert card.send(pieces_of(data, *cuts), indirect=indirect) == HEAD10 + b"\0\0" + FRAME
        sizes = [len(piece) for piece in pieces_of(data + bytes(100), *cuts)]
        assert card.receive(HEAD10 + b"\0\0" + FRAME, *sizes, indirect=indirect) == data


@on_both_sides
@pytest.mark.parametrize("length", [14, 60, 242, 243, 256, 1514, 65553])
def test_a_legacy_driver_gets_frames_of_every_length(length: int, judged: bool) -> None:
    """Around the sizes at which a frame is copied, and the largest."""
    frame = FRAME[:14] + bytes(index & 0xFF for index in range(length - 14))
    with Card(judge=Judge() if judged else None) as card:
        assert card.send([HEAD10, frame]) == HEAD10 + b"\0\0" + frame
        assert card.receive(HEAD10 + b"\0\0" + frame, 10, 66000) == HEAD10 + frame


@on_both_sides
def test_a_frame_without_room_is_lost_alone(judged: bool) -> None:
    """A legacy driver merges no buffers: what is too long for one is refused, and the buffer waits for the next."""
    with Card(judge=Judge() if judged else None) as card:
        room = card.rig.ram.put(b"\xee" * 300)
        for _ in range(2):
            card.rig.queues[0].submit([], [(room, 200)])
        card.wire.arrive(
            bytes(HEADER_BYTES) + FRAME, HEAD10 + b"\0\0" + FRAME[:190], HEAD10 + b"\0\0" + FRAME[:14]
        )
        used = card.rig.wait_used(0, 2)
        assert [size for _, size in used] == [200, 24]
        assert card.target.backend.snapshot()["denials"]["queue_full"] == 1
    with Card(judge=Judge() if judged else None) as card:
        for size in (1, 9, 10, 11, 23):
            card.rig.queues[0].submit([], [(card.rig.ram.put(b"\xee" * size), size)])
            card.wire.arrive(bytes(HEADER_BYTES) + FRAME[:14])
            card.rig.settle()
        assert card.rig.queues[0].collect() == []


def test_too_short_and_too_long_are_refused() -> None:
    """24 bytes is the least: the header and an Ethernet header."""
    with Card() as card:
        assert card.send([HEAD10, FRAME[:13]]) == b""
        assert card.send([HEAD10 + FRAME[:14]]) == HEAD10 + b"\0\0" + FRAME[:14]
        assert card.send([HEAD10, bytes(65554)]) == b""
        assert card.target.backend.snapshot()["denials"] == {"invalid": 2}


def test_it_is_decided_again_after_each_reset() -> None:
    """A boot loader's driver and then the kernel's, on one card; and the next frontend starts as none did before."""
    with Card() as card:
        assert card.send([HEAD10, FRAME]) == HEAD10 + b"\0\0" + FRAME
        frontend, rig = card.rig.frontend, card.rig
        for features, size in ((Feature.VERSION_1, 12), (0, 10), (NetFeature.MRG_RXBUF, 12), (0, 10)):
            frontend.tell(FrontendRequest.RESET_DEVICE)
            frontend.tell(FrontendRequest.SET_FEATURES, U64.pack(LEGACY | features))
            for index, queue in enumerate(rig.queues):
                queue.reset()
                frontend.start(index, queue)
            assert card.send([HEAD10.ljust(size, b"\0"), FRAME]) == HEAD10 + b"\0\0" + FRAME
            assert len(card.receive(HEAD10 + b"\0\0" + FRAME, size, 1600)) == size + len(FRAME)
            rig.ram.rewind(rig.heap)


def make_pair(loop: Loop) -> list[NetBackend]:
    return [NetBackend(f"net{index}", loop, port) for index, port in enumerate(join_ports())]


@pytest.mark.parametrize("sizes", [(10, 10), (10, 12), (12, 10)])
def test_two_joined_cards_with_different_headers(sizes: tuple[int, int]) -> None:
    """The frame goes from ring to ring, each with its own header."""
    pair: list[NetBackend] = []

    def first(loop: Loop) -> Backend:
        pair.extend(make_pair(loop))
        return pair[0]

    features = [LEGACY | (Feature.VERSION_1 if size == 12 else 0) for size in sizes]
    with Stepped(first) as one:
        second = Stepped.__new__(Stepped)
        second.__dict__ |= {**vars(one), "backend": pair[1], "reasons": [], "_connection": None}
        with (
            Rig(one, 2, features=features[0], event_idx=False) as sender,
            Rig(second, 2, features=features[1], event_idx=False) as taker,
        ):
            room = taker.ram.allocate(2000)
            for wait in (False, True):
                if not wait:
                    taker.queues[0].submit([], [(room, 2000)])
                    taker.settle()
                sender.request(HEAD10.ljust(sizes[0], b"\0") + FRAME, index=1)
                if wait:
                    taker.queues[0].submit([], [(room, 2000)])
                ((_, written),) = taker.wait_used(0)
                assert written == sizes[1] + len(FRAME)
                assert taker.ram.read(room, written)[sizes[1] :] == FRAME
        second._connection = None
        pair[1].close()


def test_an_echo_has_the_driver_s_header() -> None:
    with Stepped(lambda loop: NetBackend("net", loop, EchoPort())) as target:
        with Rig(target, 2, features=LEGACY, event_idx=False) as rig:
            room = rig.ram.allocate(2000)
            rig.queues[0].submit([], [(room, 2000)])
            rig.request(HEAD10 + FRAME, index=1)
            ((_, written),) = rig.wait_used(0)
            assert rig.ram.read(room, written)[10:] == FRAME[6:12] + FRAME[:6] + FRAME[12:]


# -- what is refused, and seen ---------------------------------------------------------------------------------------


def records(data: bytes) -> list[tuple[int, bytes]]:
    """Direction and frame of each record of a capture."""
    found, at = [], 0
    while at < len(data):
        _, kept, _, direction = struct.unpack_from("<QIIQ", data, at)
        found.append((direction, data[at + 24 : at + 24 + kept]))
        at += 24 + (kept + 7 & ~7)
    return found


@pytest.mark.parametrize("features", [LEGACY, LEGACY | Feature.VERSION_1], ids=["legacy", "modern"])
@pytest.mark.parametrize("verdict", [DENY, DENY | HOLDS | 1 << SLOT_SHIFT, MALFORMED])
def test_what_is_refused_is_captured_and_marked(features: int, verdict: int) -> None:
    """Both ways, known or asked for, by rule or as no frame at all; counted apart."""
    size = 12 if features & Feature.VERSION_1 else 10
    judge = Judge(verdict)
    frame = udp4()
    with Card(features=features, judge=judge) as card:
        net = card.target.backend
        assert isinstance(net, NetBackend)
        capture = net.start_capture(2000, lambda: None)
        for _ in range(2):
            assert card.send([bytes(size), frame]) == b""
        assert card.send([bytes(size), frame[:10]]) == b""
        card.rig.queues[0].submit([], [(card.rig.ram.allocate(2000), 2000)])
        card.wire.arrive(bytes(12) + frame, bytes(12) + frame[:13])
        card.rig.settle()
        assert records(capture.read(1 << 20)) == [
            (2 | 4, frame),
            (2 | 4, frame),
            (2 | 4, frame[:10]),
            (1 | 4, frame),
            (1 | 4, frame[:13]),
        ]
        judge.verdict = 1
        judge.epoch[0] += 1
        assert card.send([bytes(size), frame]) == bytes(12) + frame
        card.wire.arrive(bytes(12) + frame)
        card.rig.wait_used(0)
        assert records(capture.read(1 << 20)) == [(2, frame), (1, frame)]
        denials = net.snapshot()["denials"]
        assert denials == ({"invalid": 5} if verdict == MALFORMED else {"invalid": 2, "firewall": 3})


# -- the list of buffers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(1,), (10,), (11,), (3, 7), (3, 8, 2), (9, 1, 5), (0, 10, 4), (4, 0, 6)])
@pytest.mark.parametrize("skip", [0, 1, 3, 9, 10, 11])
def test_a_buffer_is_inserted_at_any_place(lengths: tuple[int, ...], skip: int) -> None:
    """Between the first bytes and the rest, whichever buffers they are in; not behind the end."""
    room, more = bytearray(range(100, 200)), bytearray(b"--")
    buffers, at = Buffers(), 0
    for length in lengths:
        buffers.add(address_of(room) + at, length)
        at += length
    before = [buffers.at(index) for index in range(buffers.count)]
    done = buffers.insert(skip, 2, address_of(more))
    assert done == (skip <= at)
    if not done:
        assert [buffers.at(index) for index in range(buffers.count)] == before
        return
    out = bytearray(200)
    assert buffers.total == at + 2 == buffers.gather(0, 200, address_of(out))
    assert out[: at + 2] == room[:skip] + b"--" + room[skip:at]


def test_a_full_list_takes_no_more() -> None:
    room = bytearray(MAX_BUFFERS)
    fits = [filled(room, MAX_BUFFERS - less).insert(1, 1, address_of(room)) for less in range(4)]
    assert fits == [False, False, True, True]


def filled(room: bytearray, count: int) -> Buffers:
    buffers = Buffers()
    for index in range(count):
        buffers.add(address_of(room) + index, 1)
    return buffers

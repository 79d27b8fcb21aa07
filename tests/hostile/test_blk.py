"""Block requests of a hostile guest (rows B1 to B5, V8 and V10 for blk, of the threat model)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from rayos_devices.backend import Backend
from rayos_devices.blk.backend import MAX_REQUEST_BYTES, MAX_SEGMENT_SECTORS, MAX_SEGMENTS, BlkBackend
from rayos_devices.blk.store import RawStore
from rayos_devices.blk.wire import BlkFeature, RequestType, Status
from rayos_devices.loop import Loop
from rayos_vmm.shared.spec import Device
from tests.framework.hostile import DEVICES, IMAGE_BYTES, SECTOR, image
from tests.framework.kept import Sandboxed
from tests.framework.target import Rig, Served, Stepped

SECTORS = IMAGE_BYTES // 512
IN, OUT, FLUSH, GET_ID = RequestType.IN, RequestType.OUT, RequestType.FLUSH, RequestType.GET_ID
DISCARD, WRITE_ZEROES = RequestType.DISCARD, RequestType.WRITE_ZEROES
IOERR, UNSUPP = Status.IOERR, Status.UNSUPP


class Disk(NamedTuple):
    target: Stepped[Backend] | Served
    image: Path


@pytest.fixture(scope="module", params=["stepped", "served", "stepped, read only", "served, read only"])
def any_disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    directory = tmp_path_factory.mktemp("blk")
    path = image(directory)
    read_only = "read only" in request.param
    with ExitStack() as stack:
        target: Stepped[Backend] | Served
        if request.param.startswith("served"):
            fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
            device = Device(kind="blk", name="blk", fd=fd, read_only=read_only, serial="hostile")
            target = stack.enter_context(Sandboxed(directory, device))
            os.close(fd)
        else:
            mode = os.O_RDONLY if read_only else os.O_RDWR

            def make(loop: Loop) -> Backend:
                return BlkBackend(
                    "blk", loop, RawStore(os.open(path, mode), read_only=read_only), serial="hostile"
                )

            target = stack.enter_context(Stepped(make))
        yield Disk(target, path)


@pytest.fixture
def disk(any_disk: Disk, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A session of its own; the image must say what it said, and an honest request must be served."""
    with Rig(any_disk.target) as rig:
        yield rig
        DEVICES["blk"].honest(rig)
        assert not rig.queues[0].has_error()
    assert any_disk.image.read_bytes() == SECTOR * SECTORS, "the image was changed"


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def segments(*entries: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *entry) for entry in entries)


def status(rig: Rig, data: bytes, room: int = 1, *, indirect: bool = True) -> Status:
    """Send a request whose last byte is its status; 0xEE there means that nobody wrote it."""
    target = rig.ram.allocate(room, 4096)
    rig.ram.write(target, b"\xee" * room)
    rig.ram.rewind(rig.heap)
    answer = rig.request(data, room, indirect=indirect)
    assert len(answer) in (room, 1) and answer[-1] != 0xEE
    return Status(answer[-1])


# -- B1: where and how much ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [IN, OUT], ids=["read", "write"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize(
    ("sector", "length"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (SECTORS + 1, 512),
        (1 << 32, 512),
        ((1 << 55) - 1, 512),
        (1 << 55, 512),
        ((1 << 55) + 3, 512),
        ((1 << 63) - 1, 512),
        (1 << 63, 512),
        ((1 << 64) - 1, 512),
        ((1 << 64) - 1, 1024),
        (0, 1),
        (0, 511),
        (0, 513),
        (0, IMAGE_BYTES + 512),
        (SECTORS - 2, 1025),
    ],
)
def test_B1_a_range_that_is_not_on_the_disk(
    disk: Rig, kind: RequestType, indirect: bool, sector: int, length: int
) -> None:
    """IOERR; no wrap of sector times 512 finds its way back onto the disk."""
    if kind is IN:
        assert status(disk, header(IN, sector), length + 1, indirect=indirect) is IOERR
    else:
        assert status(disk, header(OUT, sector) + b"W" * length, indirect=indirect) is IOERR


@pytest.mark.parametrize("kind", [IN, OUT], ids=["read", "write"])
def test_B1_more_than_a_request_may_move(disk: Rig, kind: RequestType) -> None:
    """The same megabytes over and over in one chain: refused by its sum, before any is moved."""
    head, target = disk.ram.put(header(kind)), disk.ram.allocate(1)
    data = [(disk.ram.base, 1 << 20)] * (MAX_REQUEST_BYTES // (1 << 20) + 1)
    queue = disk.queues[0]
    if kind is IN:
        queue.submit([(head, 16)], [*data, (target, 1)], indirect=True)
    else:
        queue.submit([(head, 16), *data], [(target, 1)], indirect=True)
    disk.wait_used()
    assert disk.ram.read(target, 1)[0] == IOERR


@pytest.mark.parametrize("kind", [IN, OUT], ids=["read", "write"])
def test_B1_no_data_at_all(disk: Rig, kind: RequestType) -> None:
    """Zero sectors: answered, nothing moved."""
    assert status(disk, header(kind, 0)) in (Status.OK, IOERR)
    assert status(disk, header(kind, SECTORS + 1)) is IOERR


def test_B1_the_last_sector_is_on_the_disk(disk: Rig) -> None:
    """The boundary from its other side."""
    assert disk.request(header(IN, SECTORS - 1), 513) == SECTOR + b"\0"


# -- B2: read only ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("any_disk", ["stepped, read only", "served, read only"], indirect=True)
@pytest.mark.parametrize(
    "data",
    [
        header(OUT) + b"W" * 512,
        header(OUT, SECTORS - 1) + b"W" * 512,
        header(DISCARD) + segments((0, 8, 0)),
        header(WRITE_ZEROES) + segments((0, 8, 1)),
    ],
    ids=["write", "write the last", "discard", "write zeroes"],
)
@pytest.mark.parametrize(
    "features", [None, 1 << 30 | 1 << 32, (1 << 64) - 1], ids=["offered", "none", "all bits"]
)
def test_B2_a_read_only_disk_stays_as_it_is(any_disk: Disk, data: bytes, features: int | None) -> None:
    """Whatever the driver acknowledged, RO among it or not: the host's word counts."""
    with Rig(any_disk.target, features=features, event_idx=features != 1 << 30 | 1 << 32) as rig:
        assert bool(rig.offered & BlkFeature.RO)
        assert status(rig, data, indirect=False) in (IOERR, UNSUPP)
        DEVICES["blk"].honest(rig)
    assert any_disk.image.read_bytes() == SECTOR * SECTORS


# -- B3, V8, V10: what a request is made of --------------------------------------------------------------------------


class Shape(NamedTuple):
    """Lengths of readable and writable buffers; the header is the readable bytes' start."""

    readable: tuple[int, ...]
    writable: tuple[int, ...]


BAD_SHAPES = {
    "V8 only readable": Shape((16,), ()),
    "V8 only readable, with data": Shape((16, 512), ()),
    "V8 only writable": Shape((), (512, 1)),
    "V8 a header and nothing": Shape((16,), ()),
    "V8 a status and nothing": Shape((), (1,)),
    "V10 a header of 15 bytes": Shape((15,), (512, 1)),
    "V10 a header of 1 byte": Shape((1,), (512, 1)),
    "V10 a header of no bytes": Shape((0,), (512, 1)),
    "V10 one byte and no status": Shape((1,), ()),
    "V10 half a header in eight": Shape((1,) * 8, (1,)),
    "B3 the header is writable": Shape((), (16, 512, 1)),
    "B3 the status has no bytes": Shape((16, 512), (0,)),
    "B3 nothing has any bytes": Shape((0, 0), (0, 0)),
    "B3 the status is readable": Shape((16, 512, 1), ()),
}


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("kind", [IN, OUT, FLUSH, GET_ID, DISCARD, 99])
@pytest.mark.parametrize("case", BAD_SHAPES)
def test_B3_V8_V10_a_chain_without_header_or_status(disk: Rig, case: str, kind: int, indirect: bool) -> None:
    """Class C: used(head, 0); of its buffers the last writable byte alone is touched, which tells a driver of it."""
    shape = BAD_SHAPES[case]
    bytes_ = header(kind).ljust(2048, b"\xaa")
    source, room = disk.ram.put(bytes_), disk.ram.put(b"\xee" * 2048)
    readable, writable = [], []
    done = 0
    for length in shape.readable:
        readable.append((source + done, length))
        done += length
    done = 0
    for length in shape.writable:
        writable.append((room + done, length))
        done += length
    head = disk.queues[0].submit(readable, writable, indirect=indirect)
    assert disk.wait_used() == [(head, 0)]
    end = sum(shape.writable)
    told = bytes([IOERR]) if end else b""
    assert disk.ram.read(room, 2048) == b"\xee" * (end - len(told)) + told + b"\xee" * (2048 - end)


@pytest.mark.parametrize(
    ("kind", "readable", "writable", "expected"),
    [
        (IN, (16, 512), (1,), (Status.OK, IOERR)),
        (OUT, (16,), (512, 1), (Status.OK, IOERR)),
        (FLUSH, (16, 512), (1,), (Status.OK, IOERR)),
        (FLUSH, (16,), (512, 1), (Status.OK, IOERR)),
        (IN, (20,), (512, 1), (Status.OK, IOERR)),
        (DISCARD, (16,), (16, 1), (IOERR, UNSUPP)),
    ],
    ids=["read from", "write into", "flush with data", "flush with room", "header of 20", "discard into"],
)
def test_B3_B5_data_of_the_wrong_direction(
    disk: Rig,
    kind: RequestType,
    readable: tuple[int, ...],
    writable: tuple[int, ...],
    expected: tuple[Status, ...],
) -> None:
    """Answered (class R); a buffer that the device may only read stays as it was."""
    source = disk.ram.put(header(kind) + b"\xaa" * 1024)
    room = disk.ram.put(b"\xee" * 1024)
    disk.queues[0].submit([(source, sum(readable))], [(room, sum(writable))])
    ((_, written),) = disk.wait_used()
    assert written <= sum(writable)
    assert disk.ram.read(source, 1040) == header(kind) + b"\xaa" * 1024
    assert Status(disk.ram.read(room, sum(writable))[-1]) in expected


@pytest.mark.parametrize("status_at", [0, 1, 511])
def test_B3_the_status_is_the_last_writable_byte(disk: Rig, status_at: int) -> None:
    """Wherever the buffers are cut."""
    head = disk.ram.put(header(IN, 3))
    room = disk.ram.allocate(513)
    pieces = [(room, 512 - status_at), (room + 512 - status_at, status_at + 1)]
    disk.queues[0].submit([(head, 16)], pieces)
    disk.wait_used()
    assert disk.ram.read(room, 513) == SECTOR + b"\0"


# -- B4: discard and write zeroes ------------------------------------------------------------------------------------

BAD_SEGMENTS = {
    "none": b"",
    "half a segment": segments((0, 8, 0))[:8],
    "a segment and a half": segments((0, 8, 0)) + bytes(8),
    "one too many": segments(*[(0, 0, 0)] * (MAX_SEGMENTS + 1)),
    "very many": segments(*[(0, 1, 0)] * 1000),
    "beyond the disk": segments((SECTORS, 1, 0)),
    "across the end": segments((SECTORS - 1, 2, 0)),
    "sector 2^64-1": segments(((1 << 64) - 1, 1, 0)),
    "sector 2^55": segments((1 << 55, 8, 0)),
    "2^32-1 sectors": segments((0, 0xFFFFFFFF, 0)),
    "more sectors than allowed": segments((0, MAX_SEGMENT_SECTORS + 1, 0)),
    "good and then bad": segments((0, 8, 0), (SECTORS, 8, 0)),
    "unknown flag": segments((0, 8, 2)),
    "every flag": segments((0, 8, 0xFFFFFFFF)),
    "good and then an unknown flag": segments((0, 8, 0), (8, 8, 4)),
}


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES], ids=["discard", "write zeroes"])
@pytest.mark.parametrize("case", BAD_SEGMENTS)
def test_B4_segments_that_cannot_be(disk: Rig, kind: RequestType, case: str) -> None:
    """IOERR or UNSUPP, and none of the segments is done: the image stays as it is."""
    assert status(disk, header(kind) + BAD_SEGMENTS[case]) in (IOERR, UNSUPP)


def test_B4_discard_has_no_unmap_flag(disk: Rig) -> None:
    """5.2.6.2: reserved for DISCARD, so UNSUPP."""
    assert status(disk, header(DISCARD) + segments((0, 8, 1))) is UNSUPP


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES], ids=["discard", "write zeroes"])
def test_B4_what_was_not_negotiated_is_not_done(any_disk: Disk, kind: RequestType) -> None:
    """UNSUPP, and the image stays as it is."""
    features = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28
    with Rig(any_disk.target, features=features) as rig:
        assert status(rig, header(kind) + segments((0, 8, 0))) is UNSUPP
        DEVICES["blk"].honest(rig)
    assert any_disk.image.read_bytes() == SECTOR * SECTORS


# -- B5: the rest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1, 19])
def test_B5_an_id_into_too_little_room(disk: Rig, room: int) -> None:
    """As much as fits, as QEMU's own disk gives it."""
    target = disk.ram.put(b"\xee" * 64)
    head = disk.ram.put(header(GET_ID))
    disk.queues[0].submit([(head, 16)], [(target, room + 1)])
    disk.wait_used()
    identity = disk.ram.read(target, room)
    assert identity in (b"hostile".ljust(20, b"\0")[:room], bytes(room))
    assert disk.ram.read(target + room, 64 - room) == b"\0" + b"\xee" * (63 - room)


@pytest.mark.parametrize("room", [20, 21, 512])
def test_B5_an_id_is_twenty_bytes(disk: Rig, room: int) -> None:
    """However much room there is: nothing of ours leaks behind it."""
    target = disk.ram.put(b"\xee" * 1024)
    head = disk.ram.put(header(GET_ID))
    disk.queues[0].submit([(head, 16)], [(target, room + 1)])
    disk.wait_used()
    identity = disk.ram.read(target, 20)
    assert identity in (b"hostile".ljust(20, b"\0"), bytes(20))
    assert disk.ram.read(target + 20, 1004) == b"\xee" * (room - 20) + b"\0" + b"\xee" * (1023 - room)


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 12, 14, 16, 255, 1 << 16, 1 << 31, 0xFFFFFFFF])
def test_B5_an_unknown_request(disk: Rig, kind: int) -> None:
    """UNSUPP (5.2.6.2)."""
    assert status(disk, header(kind)) is UNSUPP
    assert status(disk, header(kind) + b"W" * 512) is UNSUPP
    assert status(disk, header(kind), 513) is UNSUPP


def test_B5_reserved_header_bits_change_nothing(disk: Rig) -> None:
    """The field that was ioprio is ignored."""
    assert disk.request(struct.pack("<IIQ", IN, 0xFFFFFFFF, 3), 513) == SECTOR + b"\0"

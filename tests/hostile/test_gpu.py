"""A hostile guest and the GPU: rows G1 to G8 of the hostile inputs, each case by its row.

Every case ends with the same demand (`healthy`): the device serves an honest command, its memory is accounted exactly,
nothing was raised in the worker, and the picture shown before is still the last good one.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from rayos_devices.gpu.commands import CONTROL, CURSOR
from rayos_devices.gpu.heap import PAGE_BYTES
from rayos_devices.gpu.resource import MAX_RESOURCES
from rayos_devices.gpu.scanout import MAX_SCANOUT_SIDE
from rayos_devices.gpu.wire import (
    DISPLAY_INFO_BYTES,
    EDID_BYTES,
    HEADER_BYTES,
    Answer,
    AttachBacking,
    Command,
    Format,
    Header,
    Rect,
    ResourceCreate2d,
    ResourceFlush,
    ResourceId,
    SetScanout,
    TransferToHost2d,
    UpdateCursor,
)
from rayos_vmm.shared.spec import Device
from tests.framework.controlled import Bounds, RealGpuGuest
from tests.framework.gpu import OK, GpuGuest, pack_entries
from tests.framework.kept import Kept

MAX = 0xFFFF_FFFF
W, H = 64, 48
SIZE = W * H * 4
PICTURE = bytes(range(256)) * (SIZE // 256)
#: Resource 1 is on scanout 0 with a backing; resource 2 has none; resource 3 is a cursor.
USED = (3 + 1 + 1 + 4) * PAGE_BYTES


Maker = Callable[..., GpuGuest]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """A sandboxed worker with two GPUs, for all cases: none may end it, none may leave anything open."""
    devices = [
        Device(kind="gpu", name=f"gpu{scanouts}", scanouts=scanouts, quota_bytes=128 << 20)
        for scanouts in (1, 2)
    ]
    with Kept(tmp_path_factory.mktemp("gpu"), devices) as kept:
        bounds = Bounds(kept, ["gpu1", "gpu2"])
        yield kept
        bounds.check()


@pytest.fixture(params=["stepped", "served"])
def make_guest(request: pytest.FixtureRequest) -> Maker:
    """Guests of a GPU in this process, or of the real worker's."""
    if request.param == "stepped":
        return GpuGuest
    return partial(RealGpuGuest, request.getfixturevalue("kept"))


@pytest.fixture
def guest(make_guest: Maker) -> Iterator[GpuGuest]:
    with make_guest(width=W, height=H) as guest:
        backing = guest.show(1, W, H)
        guest.draw(1, Rect(0, 0, W, H), PICTURE, backing, W * 4)
        assert guest.create(2, 32, 32) == OK
        assert guest.create(3, 64, 64, Format.B8G8R8A8) == OK
        yield guest
        assert not any(queue.broken for queue in guest.backend.queues)
        guest.check_session()


def healthy(guest: GpuGuest) -> None:
    assert guest.backend.heap.used_bytes == USED
    assert guest.backend.frame().pixels == PICTURE
    assert guest.create(77, 8, 8) == OK
    assert guest.unref(77) == OK
    assert guest.backend.heap.used_bytes == USED


PARAMETER = Answer.ERR_INVALID_PARAMETER
RESOURCE = Answer.ERR_INVALID_RESOURCE_ID
MEMORY = Answer.ERR_OUT_OF_MEMORY
UNSPEC = Answer.ERR_UNSPEC


@pytest.mark.parametrize(
    ("resource_id", "format_", "width", "height", "answer"),
    [
        pytest.param(9, 1, 65535, 65535, MEMORY, id="65535x65535"),
        pytest.param(9, 1, MAX, MAX, MEMORY, id="largest"),
        pytest.param(9, 1, 0x4000_0000, 1, MEMORY, id="stride-wraps-u32-to-0"),
        pytest.param(9, 1, 0x4000_0001, 1, MEMORY, id="stride-wraps-u32-to-4"),
        pytest.param(9, 1, 0x1_0000, 0x1_0000, MEMORY, id="area-wraps-u32"),
        pytest.param(9, 1, 0x8000_0000, 0x2000_0000, MEMORY, id="size-wraps-u64"),
        pytest.param(9, 1, 512, 513, MEMORY, id="a-row-beyond-the-quota"),
        pytest.param(9, 1, 1, (1 << 18) + 1, MEMORY, id="a-pixel-beyond-the-quota"),
        pytest.param(9, 1, 0, 0, PARAMETER, id="0x0"),
        pytest.param(9, 1, 0, 16, PARAMETER, id="no-width"),
        pytest.param(9, 1, 16, 0, PARAMETER, id="no-height"),
        pytest.param(9, 0, 8, 8, PARAMETER, id="format-0"),
        pytest.param(9, 5, 8, 8, PARAMETER, id="format-5"),
        pytest.param(9, 66, 8, 8, PARAMETER, id="format-66"),
        pytest.param(9, 122, 8, 8, PARAMETER, id="format-122"),
        pytest.param(9, MAX, 8, 8, PARAMETER, id="format-largest"),
        pytest.param(0, 1, 8, 8, RESOURCE, id="id-0"),
        pytest.param(1, 1, 8, 8, RESOURCE, id="id-in-use-and-shown"),
        pytest.param(2, 1, MAX, MAX, RESOURCE, id="id-in-use-and-too-large"),
    ],
)
def test_g1_create(
    guest: GpuGuest, resource_id: int, format_: int, width: int, height: int, answer: Answer
) -> None:
    body = ResourceCreate2d(resource_id, format_, width, height).pack()
    assert guest.command(Command.RESOURCE_CREATE_2D, body).kind == answer
    healthy(guest)


def test_g2_create_until_the_quota(make_guest: Maker) -> None:
    """Exactly the quota, then OUT_OF_MEMORY; everything comes back."""
    with make_guest(quota_bytes=64 * PAGE_BYTES) as guest:
        made = 0
        while (answer := guest.create(made + 1, 32, 32)) == OK:
            made += 1
        assert (made, answer) == (64, MEMORY)
        for number in range(made):
            assert guest.unref(number + 1) == OK
        assert guest.backend.heap.used_bytes == 0 and guest.heap_blocks() == 0


def test_g2_create_until_the_table_is_full(make_guest: Maker) -> None:
    """Many tiny resources are bounded too, so that the state that is saved is."""
    with make_guest(quota_bytes=2 * MAX_RESOURCES * PAGE_BYTES) as guest:
        for number in range(MAX_RESOURCES):
            assert guest.create(MAX - number, 1, 1) == OK
        assert guest.create(1, 1, 1) == MEMORY
        assert guest.unref(MAX) == OK
        assert guest.create(1, 1, 1) == OK


def test_g2_loops_of_create_and_unref_leave_nothing(guest: GpuGuest) -> None:
    before = guest.heap_blocks()
    backing = guest.ram.allocate(PAGE_BYTES, PAGE_BYTES)
    guest.keep()
    for _ in range(300):
        assert guest.create(9, 32, 96) == OK
        assert guest.attach(9, [(backing, PAGE_BYTES)] * 3) == OK
        assert guest.transfer(9, Rect(0, 0, 32, 96)) == OK
        assert guest.unref(9) == OK
    assert guest.heap_blocks() == before
    healthy(guest)


@pytest.mark.parametrize("command", [Command.RESOURCE_UNREF, Command.RESOURCE_DETACH_BACKING])
@pytest.mark.parametrize("resource_id", [0, 4, 0x1_0001, MAX])
def test_g2_no_such_resource(guest: GpuGuest, command: Command, resource_id: int) -> None:
    assert guest.command(command, ResourceId(resource_id).pack()).kind == RESOURCE
    healthy(guest)


def test_g2_twice_freed(guest: GpuGuest) -> None:
    assert guest.create(9, 8, 8) == OK
    assert guest.unref(9) == OK
    assert guest.unref(9) == RESOURCE
    healthy(guest)


@pytest.mark.parametrize("count", [0, 3, 1000, 16385, 0x1000_0000, 0x1000_0001, 0x8000_0000, MAX])
def test_g3_entry_count(guest: GpuGuest, count: int) -> None:
    """The count alone, with one entry behind it: nothing is allocated for what was only claimed."""
    body = AttachBacking(2, count).pack() + pack_entries([(guest.ram.base, 4096)])
    assert guest.command(Command.RESOURCE_ATTACH_BACKING, body).kind == PARAMETER
    healthy(guest)


@pytest.mark.parametrize("missing", [1, 4, 8, 15, 16, 17, 32])
def test_g3_more_entries_than_the_command_holds(guest: GpuGuest, missing: int) -> None:
    entries = pack_entries([(guest.ram.base, 2048), (guest.ram.base, 2048)])
    body = AttachBacking(2, 2).pack() + entries[: len(entries) - missing]
    assert guest.command(Command.RESOURCE_ATTACH_BACKING, body).kind == PARAMETER
    healthy(guest)


def _bad_entries(base: int, end: int) -> dict[str, list[tuple[int, int]]]:
    good = (base, 4096)
    return {
        "before-memory": [(base - 4096, 4096)],
        "address-0": [(0, 4096)],
        "behind-memory": [(end, 4096)],
        "across-the-start": [(base - 1, 4096)],
        "across-the-end": [(end - 4095, 4096)],
        "good-then-across-the-end": [good, (end - 4095, 4096)],
        "wraps-u64": [((1 << 64) - 4096, 4096)],
        "wraps-u64-by-one": [((1 << 64) - 4095, 4096)],
        "largest-address": [((1 << 64) - 1, 1)],
        "largest-length": [(base, MAX)],
        "zero-length": [(base, 0)],
        "good-then-zero-length": [good, (base, 0)],
        "zero-length-outside": [(0, 0)],
    }


@pytest.mark.parametrize("name", sorted(_bad_entries(0, 0)))
def test_g3_bad_entries(guest: GpuGuest, name: str) -> None:
    entries = _bad_entries(guest.ram.base, guest.ram.end)[name]
    assert guest.attach(2, entries) == PARAMETER
    assert guest.transfer(2, Rect(0, 0, 1, 1)) == UNSPEC
    healthy(guest)


def test_g3_attached_twice(guest: GpuGuest) -> None:
    assert guest.attach(1, [(guest.ram.base, 4096)]) == UNSPEC
    healthy(guest)


def test_g3_attach_to_nothing(guest: GpuGuest) -> None:
    assert guest.attach(9, [(guest.ram.base, 4096)]) == RESOURCE
    healthy(guest)


def test_g3_detach_without_a_backing(guest: GpuGuest) -> None:
    assert guest.detach(2) == UNSPEC
    healthy(guest)


def test_g3_backing_beyond_the_quota(guest: GpuGuest) -> None:
    """The list itself is memory of the host and counts."""
    room = (guest.backend.heap.size_bytes - USED) // PAGE_BYTES
    assert guest.create(9, 1024, room) == OK
    assert guest.attach(2, [(guest.ram.base, 4096)]) == MEMORY
    assert guest.unref(9) == OK
    healthy(guest)


def test_g3_an_honest_guest_with_many_pages(make_guest: Maker) -> None:
    """An 81 MB texture of scattered pages has more than QEMU's 16384 entries, and works (a real driver's log)."""
    with make_guest(quota_bytes=128 << 20, ram_bytes=16 << 20) as guest:
        pages = 19715
        assert guest.create(1, 1024, pages) == OK
        page = guest.ram.allocate(2 * PAGE_BYTES, PAGE_BYTES)
        guest.keep()
        guest.ram.write(page, b"\x33" * PAGE_BYTES)
        assert guest.attach(1, [(page + PAGE_BYTES, PAGE_BYTES)] + [(page, PAGE_BYTES)] * (pages - 1)) == OK
        assert guest.transfer(1, Rect(0, pages - 1, 1024, 1), (pages - 1) * PAGE_BYTES) == OK
        assert guest.set_scanout(0, 1, Rect(0, pages - 1, 1024, 1)) == OK
        assert set(guest.backend.frame().pixels) == {0x33}


def test_g3_backing_is_the_ring_itself(guest: GpuGuest) -> None:
    """The guest may show its own rings as pixels: it hurts nobody."""
    queue = guest.rig.queues[CONTROL]
    assert guest.attach(2, [(queue.used, 512), (queue.descriptors, 1024)]) == OK
    assert guest.transfer(2, Rect(0, 0, 32, 12)) == OK
    assert guest.detach(2) == OK
    healthy(guest)


_BAD_RECTS = [
    pytest.param(Rect(0, 0, 0, 0), id="0x0"),
    pytest.param(Rect(0, 0, 0, 1), id="no-width"),
    pytest.param(Rect(0, 0, 1, 0), id="no-height"),
    pytest.param(Rect(0, 0, W + 1, 1), id="a-pixel-too-wide"),
    pytest.param(Rect(0, 0, 1, H + 1), id="a-pixel-too-high"),
    pytest.param(Rect(W, 0, 1, 1), id="right-of-it"),
    pytest.param(Rect(0, H, 1, 1), id="below-it"),
    pytest.param(Rect(1, 0, W, 1), id="over-the-right-edge"),
    pytest.param(Rect(0, 1, 1, H), id="over-the-lower-edge"),
    pytest.param(Rect(MAX, 0, 1, 1), id="x-largest"),
    pytest.param(Rect(MAX, 0, 2, 1), id="x-wraps-to-1"),
    pytest.param(Rect(0, MAX, 1, 2), id="y-wraps-to-1"),
    pytest.param(Rect(1, 0, MAX, 1), id="width-wraps-to-0"),
    pytest.param(Rect(0, 1, 1, MAX), id="height-wraps-to-0"),
    pytest.param(Rect(MAX, MAX, MAX, MAX), id="largest"),
    pytest.param(Rect(0x8000_0000, 0, 0x8000_0000, 1), id="halves-wrap-to-0"),
]


@pytest.mark.parametrize("rect", _BAD_RECTS)
def test_g4_transfer_rect(guest: GpuGuest, rect: Rect) -> None:
    assert guest.transfer(1, rect) == PARAMETER
    healthy(guest)


@pytest.mark.parametrize(
    ("rect", "offset"),
    [
        (Rect(0, 0, W, H), 1),
        (Rect(0, 0, 1, 1), SIZE),
        (Rect(0, 0, 1, 1), SIZE - 3),
        (Rect(0, 0, 1, 2), SIZE - W * 4),
        (Rect(0, H - 1, W, 1), SIZE - W * 4 + 1),
        (Rect(0, 0, 1, 1), 1 << 32),
        (Rect(0, 0, 1, 1), 1 << 63),
        (Rect(0, 0, 1, 1), (1 << 64) - 1),
        (Rect(0, 0, 1, 1), (1 << 64) - 4),
        (Rect(0, 0, W, H), (1 << 64) - SIZE),
    ],
)
def test_g4_transfer_offset(guest: GpuGuest, rect: Rect, offset: int) -> None:
    assert guest.transfer(1, rect, offset) == PARAMETER
    healthy(guest)


def test_g4_backing_shorter_than_the_resource(guest: GpuGuest) -> None:
    """The backing that is there can be transferred, not a byte more."""
    page = guest.ram.allocate(PAGE_BYTES, PAGE_BYTES)
    guest.keep()
    assert guest.attach(2, [(page, 130)]) == OK
    assert guest.transfer(2, Rect(0, 0, 32, 1)) == OK
    assert guest.transfer(2, Rect(0, 0, 32, 1), 2) == OK
    assert guest.transfer(2, Rect(0, 0, 32, 1), 3) == PARAMETER
    assert guest.transfer(2, Rect(0, 0, 1, 2)) == PARAMETER
    assert guest.detach(2) == OK
    healthy(guest)


def test_g4_transfer_without_a_backing(guest: GpuGuest) -> None:
    assert guest.transfer(2, Rect(0, 0, 1, 1)) == UNSPEC
    healthy(guest)


def test_g4_transfer_after_detach_in_one_batch(guest: GpuGuest) -> None:
    """Detach and transfer offered together are done in order: the transfer finds no backing."""
    backing = guest.ram.allocate(PAGE_BYTES, PAGE_BYTES)
    commands = [
        Header(Command.RESOURCE_ATTACH_BACKING).pack()
        + AttachBacking(2, 1).pack()
        + pack_entries([(backing, 4096)]),
        Header(Command.TRANSFER_TO_HOST_2D).pack() + TransferToHost2d(Rect(0, 0, 32, 32), 0, 2).pack(),
        Header(Command.RESOURCE_DETACH_BACKING).pack() + ResourceId(2).pack(),
        Header(Command.TRANSFER_TO_HOST_2D).pack() + TransferToHost2d(Rect(0, 0, 32, 32), 0, 2).pack(),
    ]
    queue = guest.rig.queues[CONTROL]
    rooms = [guest.ram.allocate(HEADER_BYTES) for _ in commands]
    heads = [
        queue.add([(guest.ram.put(data), len(data))], [(room, HEADER_BYTES)])
        for data, room in zip(commands, rooms, strict=True)
    ]
    queue.offer(heads)
    queue.kick()
    assert len(guest.rig.wait_used(count=4)) == 4
    kinds = [Header.unpack(guest.ram.read(room, HEADER_BYTES)).kind for room in rooms]
    assert kinds == [OK, OK, OK, UNSPEC]
    healthy(guest)


@pytest.mark.parametrize("scanout", [1, 15, 16, 0x1_0000, 0x8000_0000, MAX])
@pytest.mark.parametrize("resource_id", [0, 1, 9])
def test_g5_no_such_scanout(guest: GpuGuest, scanout: int, resource_id: int) -> None:
    assert guest.set_scanout(scanout, resource_id, Rect(0, 0, W, H)) == Answer.ERR_INVALID_SCANOUT_ID
    healthy(guest)


@pytest.mark.parametrize("rect", _BAD_RECTS)
@pytest.mark.parametrize("command", [Command.SET_SCANOUT, Command.RESOURCE_FLUSH])
def test_g6_rect(guest: GpuGuest, command: Command, rect: Rect) -> None:
    serial = guest.backend.damage_serial
    is_flush = command is Command.RESOURCE_FLUSH
    body = ResourceFlush(rect, 1).pack() if is_flush else SetScanout(rect, 0, 1).pack()
    assert guest.command(command, body).kind == PARAMETER
    assert guest.backend.damage_serial == serial
    healthy(guest)


def test_g6_no_such_resource(guest: GpuGuest) -> None:
    assert guest.set_scanout(0, 9, Rect(0, 0, 1, 1)) == RESOURCE
    assert guest.flush(9, Rect(0, 0, 1, 1)) == RESOURCE
    assert guest.flush(0, Rect(0, 0, 1, 1)) == RESOURCE
    assert guest.transfer(9, Rect(0, 0, 1, 1)) == RESOURCE
    healthy(guest)


def test_g6_scanout_that_qemu_would_abort_on(guest: GpuGuest) -> None:
    """A surface wider than pixman's 32767 ends QEMU; ours is bounded below it."""
    assert guest.create(9, MAX_SCANOUT_SIDE + 1, 1) == OK
    assert guest.set_scanout(0, 9, Rect(0, 0, MAX_SCANOUT_SIDE + 1, 1)) == PARAMETER
    assert guest.unref(9) == OK
    healthy(guest)


def test_g6_widest_scanout_is_sent_in_whole_messages(guest: GpuGuest) -> None:
    with guest.monitor() as monitor:
        assert guest.create(9, MAX_SCANOUT_SIDE, 8) == OK
        assert guest.set_scanout(0, 9, Rect(0, 0, MAX_SCANOUT_SIDE, 8)) == OK
        monitor.follow(guest)
        assert monitor.picture() == bytes(MAX_SCANOUT_SIDE * 8 * 4)


def test_g6_unref_while_shown(guest: GpuGuest) -> None:
    """The scanout goes off with its resource; nobody reads freed memory, and the id may come back."""
    with guest.monitor() as monitor:
        assert guest.flush(1, Rect(0, 0, W, H)) == OK
        assert guest.unref(1) == OK
        assert guest.create(1, W, H) == OK
        monitor.follow(guest)
        assert monitor.picture() is None
        assert set(guest.backend.frame().pixels) == {0}


def test_g6_unref_while_it_is_being_sent(make_guest: Maker) -> None:
    """Strips of a picture that went are not sent, and the next picture is whole."""
    with make_guest(quota_bytes=8 << 20) as guest, guest.monitor() as monitor:
        backing = guest.show(1, 1024, 768)
        guest.draw(1, Rect(0, 0, 1024, 768), b"\x11" * (1024 * 768 * 4), backing, 4096)
        guest.rig.settle()
        monitor.read(50_000)
        assert guest.unref(1) == OK
        second = guest.show(2, 512, 512)
        guest.draw(2, Rect(0, 0, 512, 512), b"\x22" * (512 * 512 * 4), second, 2048)
        monitor.follow(guest)
        assert monitor.picture() == b"\x22" * (512 * 512 * 4)


def test_g6_flood_of_flushes(guest: GpuGuest) -> None:
    """10,000 flushes to a display that does not read: nothing is queued, one picture goes out."""
    with guest.monitor() as monitor:
        queue = guest.rig.queues[CONTROL]
        data = Header(Command.RESOURCE_FLUSH).pack() + ResourceFlush(Rect(0, 0, W, H), 1).pack()
        source, room = guest.ram.put(data), guest.ram.allocate(HEADER_BYTES)
        heads = [queue.add([(source, len(data))], [(room, HEADER_BYTES)]) for _ in range(32)]
        done = 0
        while done < 10_000:
            queue.offer(heads)
            queue.kick()
            while (got := len(queue.reap())) == 0:
                guest.rig.settle()
            done += got
        assert guest.backend.screen.display.sent_bytes < 1 << 20
        monitor.follow(guest)
        assert monitor.picture() == PICTURE


def test_g6_flood_of_mode_changes(guest: GpuGuest) -> None:
    """QEMU is never told of a surface that it does not get to show (it would leak it)."""
    with guest.monitor() as monitor:
        for step in range(60):
            assert guest.set_scanout(0, 1, Rect(0, 0, 1 + step, 48)) == OK
            if step % 3 == 0:
                assert guest.set_scanout(0, 0, Rect(0, 0, 0, 0)) == OK
            if step % 7 == 0:
                monitor.read(3000)
        assert guest.set_scanout(0, 1, Rect(0, 0, W, H)) == OK
        monitor.follow(guest)
        assert monitor.picture() == PICTURE
    healthy(guest)


_NOT_OFFERED = {
    "ASSIGN_UUID": 0x010B,
    "CREATE_BLOB": 0x010C,
    "SET_SCANOUT_BLOB": 0x010D,
    "CTX_CREATE": 0x0200,
    "CTX_DESTROY": 0x0201,
    "CTX_ATTACH_RESOURCE": 0x0202,
    "CTX_DETACH_RESOURCE": 0x0203,
    "CREATE_3D": 0x0204,
    "TRANSFER_TO_HOST_3D": 0x0205,
    "TRANSFER_FROM_HOST_3D": 0x0206,
    "SUBMIT_3D": 0x0207,
    "MAP_BLOB": 0x0208,
    "UNMAP_BLOB": 0x0209,
    "UPDATE_CURSOR-on-the-control-queue": 0x0300,
    "MOVE_CURSOR-on-the-control-queue": 0x0301,
    "an-answer": 0x1100,
    "0": 0,
    "0xff": 0xFF,
    "0x10e": 0x10E,
    "largest": MAX,
}


@pytest.mark.parametrize("name", sorted(_NOT_OFFERED))
def test_g7_not_negotiated(guest: GpuGuest, name: str) -> None:
    for body in (b"", bytes(32), b"\xff" * 200):
        assert guest.command(_NOT_OFFERED[name], body).kind == UNSPEC
    healthy(guest)


@pytest.mark.parametrize("command", [Command.GET_CAPSET_INFO, Command.GET_CAPSET])
@pytest.mark.parametrize("index", [0, 1, 2, MAX])
def test_g7_capability_sets(guest: GpuGuest, command: Command, index: int) -> None:
    assert guest.command(command, struct.pack("<II", index, MAX), room=4096).kind == PARAMETER
    healthy(guest)


@pytest.mark.parametrize("scanout", [1, 16, 0x8000_0000, MAX])
def test_g7_edid_of_no_scanout(guest: GpuGuest, scanout: int) -> None:
    reply = guest.command(Command.GET_EDID, ResourceId(scanout).pack(), EDID_BYTES)
    assert (reply.kind, reply.body) == (PARAMETER, b"")
    healthy(guest)


@pytest.mark.parametrize(
    ("cursor", "answer"),
    [
        pytest.param(UpdateCursor(1, 0, 0, 3, 0, 0), Answer.ERR_INVALID_SCANOUT_ID, id="scanout-1"),
        pytest.param(UpdateCursor(MAX, 0, 0, 0, 0, 0), Answer.ERR_INVALID_SCANOUT_ID, id="scanout-largest"),
        pytest.param(UpdateCursor(0, 0, 0, 9, 0, 0), RESOURCE, id="no-such-resource"),
        pytest.param(UpdateCursor(0, 0, 0, 2, 0, 0), PARAMETER, id="32x32"),
        pytest.param(UpdateCursor(0, 0, 0, 1, 0, 0), PARAMETER, id="64x48"),
        pytest.param(UpdateCursor(0, 0, 0, 3, 64, 0), PARAMETER, id="hot-x-64"),
        pytest.param(UpdateCursor(0, 0, 0, 3, 0, 64), PARAMETER, id="hot-y-64"),
        pytest.param(UpdateCursor(0, 0, 0, 3, MAX, MAX), PARAMETER, id="hot-largest"),
    ],
)
def test_g7_cursor(guest: GpuGuest, cursor: UpdateCursor, answer: Answer) -> None:
    assert guest.cursor(Command.UPDATE_CURSOR, cursor) == answer
    assert guest.backend.cursor() is None
    healthy(guest)


def test_g7_cursor_far_outside(guest: GpuGuest) -> None:
    """A place outside the screen is QEMU's to clip; a move names no resource that could be wrong."""
    with guest.monitor() as monitor:
        assert guest.cursor(Command.UPDATE_CURSOR, UpdateCursor(0, MAX, MAX, 3, 63, 63)) == OK
        assert guest.cursor(Command.MOVE_CURSOR, UpdateCursor(0, 0x8000_0000, 5, MAX, MAX, MAX)) == OK
        assert (
            guest.cursor(Command.MOVE_CURSOR, UpdateCursor(7, 1, 1, 0, 0, 0)) == Answer.ERR_INVALID_SCANOUT_ID
        )
        monitor.follow(guest)
        assert monitor.cursors[0] == (0x8000_0000, 5, True)
    healthy(guest)


@pytest.mark.parametrize(
    "kind", [Command.GET_DISPLAY_INFO, Command.RESOURCE_CREATE_2D, Command.SET_SCANOUT, 0, MAX]
)
def test_g7_control_commands_on_the_cursor_queue(guest: GpuGuest, kind: int) -> None:
    answer = guest.raw(Header(kind).pack() + bytes(32), 1056, queue=CURSOR)
    assert Header.unpack(answer).kind == UNSPEC and len(answer) == HEADER_BYTES
    healthy(guest)


@pytest.mark.parametrize("room", [0, 1, 8, 23])
@pytest.mark.parametrize("flags", [0, 1])
def test_g8_no_room_for_the_answer(guest: GpuGuest, room: int, flags: int) -> None:
    """The command is done, and its answer is cut: what QEMU's own display does, and drivers rely on."""
    data = Header(Command.RESOURCE_UNREF, flags, 5).pack() + ResourceId(99).pack()
    whole = guest.raw(data, HEADER_BYTES)
    assert Header.unpack(whole).kind == Answer.ERR_INVALID_RESOURCE_ID
    assert guest.raw(data, room) == whole[:room]
    healthy(guest)


@pytest.mark.parametrize(
    ("kind", "rooms"),
    [
        (Command.GET_DISPLAY_INFO, (HEADER_BYTES, DISPLAY_INFO_BYTES - 1)),
        (Command.GET_EDID, (HEADER_BYTES, EDID_BYTES - 1)),
    ],
)
def test_g8_room_for_the_header_alone(guest: GpuGuest, kind: Command, rooms: tuple[int, int]) -> None:
    """A driver with a response of 24 bytes sees what became of its command."""
    whole = guest.raw(Header(kind).pack() + bytes(8), EDID_BYTES)
    for room in rooms:
        assert guest.raw(Header(kind).pack() + bytes(8), room) == whole[:room]
    healthy(guest)


_LENGTHS = {
    Command.GET_EDID: 32,
    Command.RESOURCE_CREATE_2D: 40,
    Command.RESOURCE_UNREF: 32,
    Command.RESOURCE_ATTACH_BACKING: 32,
    Command.RESOURCE_DETACH_BACKING: 32,
    Command.SET_SCANOUT: 48,
    Command.TRANSFER_TO_HOST_2D: 56,
    Command.RESOURCE_FLUSH: 48,
}


@pytest.mark.parametrize("kind", list(_LENGTHS))
def test_g8_truncated_command(guest: GpuGuest, kind: Command) -> None:
    """Without a whole header: no answer. With a header and half a command: an error."""
    whole = Header(kind).pack() + b"\x02" * 32
    for length in (1, 4, HEADER_BYTES - 1):
        assert guest.raw(whole[:length], EDID_BYTES) == b""
    for length in (HEADER_BYTES, HEADER_BYTES + 1, _LENGTHS[kind] - 1):
        answer = guest.raw(whole[:length], EDID_BYTES)
        assert Header.unpack(answer).kind == PARAMETER and len(answer) == HEADER_BYTES
    healthy(guest)


@pytest.mark.parametrize("indirect", [False, True])
def test_g8_header_and_answer_in_single_bytes(guest: GpuGuest, indirect: bool) -> None:
    """One descriptor a byte, both ways (V10): the command is done as if it were whole."""
    data = Header(Command.RESOURCE_DETACH_BACKING, 1, 0x1122334455667788, 9).pack() + ResourceId(2).pack()
    source, room = guest.ram.put(data), guest.ram.allocate(HEADER_BYTES)
    queue = guest.rig.queues[CONTROL]
    queue.submit(
        [(source + i, 1) for i in range(len(data))],
        [(room + i, 1) for i in range(HEADER_BYTES)],
        indirect=indirect,
    )
    ((_, written),) = guest.rig.wait_used()
    assert written == HEADER_BYTES
    header = Header.unpack(guest.ram.read(room, HEADER_BYTES))
    assert header == Header(UNSPEC, 1, 0x1122334455667788, 9)
    healthy(guest)


@pytest.mark.parametrize("seed", range(8))
def test_random_commands(make_guest: Maker, seed: int) -> None:
    """400 commands of small random fields, with floods of boundary values: answered or returned, never raised."""
    dice = random.Random(seed)
    interesting = [0, 1, 2, 3, 16, 63, 64, 65, 4096, 0x7FFF_FFFF, 0x8000_0000, MAX - 1, MAX]
    kinds = [*Command, 0x10B, 0x204, 0x301, 0x1100]
    with make_guest(width=W, height=H, scanouts=2) as guest, guest.monitor() as monitor:
        for step in range(400):
            kind = dice.choice(kinds)
            fields = [
                dice.choice(interesting) if dice.random() < 0.4 else dice.randrange(4) for _ in range(8)
            ]
            body = struct.pack("<8I", *fields)
            if kind is Command.RESOURCE_ATTACH_BACKING:
                count = dice.randrange(1, 4)
                body = AttachBacking(fields[0], count).pack()
                body += pack_entries(
                    [(guest.ram.base + dice.randrange(4096), dice.randrange(5000)) for _ in range(count)]
                )
            queue = CURSOR if kind in (Command.UPDATE_CURSOR, Command.MOVE_CURSOR) else CONTROL
            guest.raw(
                Header(kind, dice.randrange(4), step).pack() + body,
                dice.choice([24, 24, 408, 1056, 3]),
                queue=queue,
            )
            if step % 50 == 0:
                monitor.follow(guest)
        monitor.follow(guest)
        frame = guest.backend.frame()
        assert monitor.picture() in (None, frame.pixels)
        guest.crash()
        assert guest.backend.frame().pixels == frame.pixels
        assert guest.command(Command.GET_DISPLAY_INFO, room=DISPLAY_INFO_BYTES).kind == Answer.OK_DISPLAY_INFO


def test_display_socket_that_takes_half_a_message(guest: GpuGuest) -> None:
    """A frontend that shrinks the buffer of its socket loses the display, and nothing else."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    assert guest.create(9, 256, 256) == OK
    assert guest.backend.take_gpu_socket(theirs.detach())
    assert guest.set_scanout(0, 9, Rect(0, 0, 256, 256)) == OK
    guest.rig.settle()
    assert "given up" in guest.backend.screen.display.error and not guest.backend.screen.display.is_connected
    ours.close()
    assert guest.set_scanout(0, 1, Rect(0, 0, W, H)) == OK
    assert guest.unref(9) == OK
    healthy(guest)
    with guest.monitor() as monitor:
        monitor.follow(guest)
        assert monitor.picture() == PICTURE

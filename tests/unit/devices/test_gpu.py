"""The GPU over real rings: information, pictures against a per-pixel reference, cursor, display, quota."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_devices.errors import ConfigurationError, ProtocolError, RequestError
from rayos_devices.gate import Denial, Op
from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.gpu.commands import CONTROL, CURSOR
from rayos_devices.gpu.heap import PAGE_BYTES
from rayos_devices.gpu.wire import (
    DISPLAY_INFO_BYTES,
    DISPLAY_ONE,
    EDID_BYTES,
    HEADER_BYTES,
    Answer,
    Command,
    Format,
    GpuFeature,
    Header,
    Rect,
    ResourceId,
    TransferToHost2d,
    UpdateCursor,
)
from rayos_devices.loop import Loop
from rayos_devices.virtio.features import TRANSPORT_FEATURES
from tests.framework.gpu import OK, GpuGuest
from tests.framework.guest_memory import GuestRam

W, H = 40, 30


def noise(size: int, seed: int) -> bytes:
    return bytes((i * 7 + i // 251 + seed * 31) & 0xFF for i in range(size))


def test_information() -> None:
    """The chosen mode in display info, EDID and config space, whatever size of config is asked for."""
    with GpuGuest(width=1280, height=800, scanouts=2) as guest:
        info = guest.command(Command.GET_DISPLAY_INFO, room=DISPLAY_INFO_BYTES)
        assert info.kind == Answer.OK_DISPLAY_INFO
        ones = list(DISPLAY_ONE.iter_unpack(info.body))
        assert ones[0] == (0, 0, 1280, 800, 1, 0) and ones[1] == (1280, 0, 1280, 800, 1, 0)
        assert ones[2:] == [(0,) * 6] * 14
        reply = guest.command(Command.GET_EDID, ResourceId(1).pack(), EDID_BYTES)
        assert reply.kind == Answer.OK_EDID
        assert struct.unpack_from("<I", reply.body)[0] == 128 and sum(reply.body[8:136]) % 256 == 0
        assert guest.rig.frontend.get_config(0, 16) == struct.pack("<IIII", 0, 0, 2, 0)
        assert guest.rig.frontend.get_config(0, 20) == struct.pack("<IIIII", 0, 0, 2, 0, 0)
        assert guest.rig.offered == TRANSPORT_FEATURES | GpuFeature.EDID


def test_edid_needs_its_feature() -> None:
    with GpuGuest(features=TRANSPORT_FEATURES) as guest:
        assert guest.command(Command.GET_EDID, ResourceId(0).pack(), EDID_BYTES).kind == Answer.ERR_UNSPEC


@st.composite
def _backing(draw: st.DrawFn) -> list[int]:
    """Entry lengths that add up to the resource."""
    total = W * H * 4
    lengths: list[int] = []
    while total:
        length = draw(st.integers(1, total)) if len(lengths) < 2 else total
        lengths.append(length)
        total -= length
    return lengths


@settings(max_examples=40, deadline=None)
@given(
    lengths=_backing(),
    order=st.permutations(range(3)),
    rects=st.lists(
        st.tuples(
            st.integers(0, W - 1),
            st.integers(0, H - 1),
            st.integers(1, W),
            st.integers(1, H),
            st.integers(0, 900),
        ),
        min_size=1,
        max_size=5,
    ),
    format_=st.sampled_from(list(Format)),
)
def test_transfers_copy_what_a_pixel_loop_would(
    lengths: list[int], order: list[int], rects: list[tuple[int, int, int, int, int]], format_: Format
) -> None:
    """Any rectangle, any offset, any scatter list: the frame is what the definition (5.7.6.8) says."""
    with GpuGuest(width=W, height=H) as guest:
        size = W * H * 4
        address = guest.ram.allocate(3 * size, 4096)
        guest.keep()
        # Entries anywhere: in slots of guest memory that are permuted.
        entries = [(address + order[i] * size, length) for i, length in enumerate(lengths)]
        source = noise(size, 5)
        at = 0
        for where, length in entries:
            guest.ram.write(where, source[at : at + length])
            at += length
        assert guest.create(1, W, H, format_) == OK
        assert guest.attach(1, entries) == OK
        assert guest.set_scanout(0, 1, Rect(0, 0, W, H)) == OK
        reference = bytearray(size)
        for x, y, width, height, offset in rects:
            rect = Rect(x, y, min(width, W - x), min(height, H - y))
            end = offset + (rect.height - 1) * W * 4 + rect.width * 4
            answer = guest.transfer(1, rect, offset)
            if end > size:
                assert answer == Answer.ERR_INVALID_PARAMETER
                continue
            assert answer == OK
            for row in range(rect.height):
                for column in range(rect.width):
                    to = ((rect.y + row) * W + rect.x + column) * 4
                    of = offset + row * W * 4 + column * 4
                    reference[to : to + 4] = source[of : of + 4]
        letters = format_.name[0::2].replace("X", "A")
        expected = bytearray(size)
        for pixel in range(0, size, 4):
            named = dict(zip(letters, reference[pixel : pixel + 4], strict=True))
            expected[pixel : pixel + 4] = bytes(named[letter] for letter in "BGRA")
        assert guest.backend.frame().pixels == bytes(expected)


def test_a_backing_over_two_regions_that_touch() -> None:
    """Neighbouring entries are joined only where one region holds both."""
    with GpuGuest() as guest, GuestRam(1 << 16, guest_address=guest.ram.end) as bank:
        guest.rig.frontend.set_memory(guest.ram, bank)
        size = 32 * 32 * 4
        data = noise(size, 9)
        guest.ram.write(guest.ram.end - 2048, data[:2048])
        bank.write(bank.base, data[2048:])
        assert guest.create(1, 32, 32) == OK
        assert guest.attach(1, [(bank.base - 2048, 2048), (bank.base, size - 2048)]) == OK
        assert guest.transfer(1, Rect(0, 0, 32, 32)) == OK
        assert guest.set_scanout(0, 1, Rect(0, 0, 32, 32)) == OK
        assert guest.backend.frame().pixels == data


def test_guest_memory_may_be_replaced_under_a_backing() -> None:
    """After SET_MEM_TABLE the same guest addresses mean the new memory; pages that went make an error, not a crash."""
    with GpuGuest() as guest, GuestRam(1 << 16, guest_address=guest.ram.end) as bank:
        guest.rig.frontend.set_memory(guest.ram, bank)
        assert guest.create(1, 8, 8) == OK
        assert guest.attach(1, [(bank.base, 256)]) == OK
        assert guest.transfer(1, Rect(0, 0, 8, 8)) == OK
        guest.rig.frontend.set_memory(guest.ram)
        assert guest.transfer(1, Rect(0, 0, 8, 8)) == Answer.ERR_UNSPEC
        with GuestRam(1 << 16, guest_address=guest.ram.end) as other:
            other.write(other.base, b"\x42" * 256)
            guest.rig.frontend.set_memory(guest.ram, other)
            assert guest.transfer(1, Rect(0, 0, 8, 8)) == OK
            assert guest.set_scanout(0, 1, Rect(0, 0, 8, 8)) == OK
            assert guest.backend.frame().pixels == b"\x42" * 256
            guest.rig.frontend.set_memory(guest.ram)


def test_frame_and_damage() -> None:
    """A flush of a shown resource makes a new serial and calls the hook; a hidden one does not."""
    with GpuGuest() as guest:
        serials: list[int] = []
        guest.backend.on_damage = serials.append
        black = guest.backend.frame()
        assert (black.width, black.height, black.stride, set(black.pixels)) == (64, 48, 256, {0})
        backing = guest.show(1, 64, 48)
        pixels = noise(64 * 48 * 4, 1)
        guest.draw(1, Rect(0, 0, 64, 48), pixels, backing, 256)
        frame = guest.backend.frame()
        assert frame.pixels == pixels and frame.serial == serials[-1] == guest.backend.damage_serial == 2
        assert guest.create(2, 8, 8) == OK
        assert guest.flush(2, Rect(0, 0, 8, 8)) == OK
        assert guest.backend.damage_serial == 2
        # A part of a bigger resource (panning): only what is inside counts.
        assert guest.set_scanout(0, 1, Rect(16, 8, 20, 10)) == OK
        frame = guest.backend.frame()
        assert (frame.width, frame.height) == (20, 10)
        assert frame.pixels[:80] == pixels[8 * 256 + 64 : 8 * 256 + 144]
        assert guest.flush(1, Rect(0, 0, 16, 48)) == OK
        assert guest.backend.damage_serial == 3
        assert guest.set_scanout(0, 0, Rect(0, 0, 0, 0)) == OK
        assert set(guest.backend.frame().pixels) == {0}
        assert guest.backend.stats.snapshot()["operations"]["gpu.readback"]["allowed"] == 4


def test_the_display_shows_the_frame() -> None:
    """QEMU's picture equals ours after any drawing, over mode changes, panning, switching off and on."""
    with GpuGuest(width=300, height=200, quota_bytes=4 << 20) as guest, guest.monitor() as monitor:
        monitor.follow(guest)
        assert monitor.picture() is None
        backing = guest.show(1, 300, 200)
        guest.draw(1, Rect(0, 0, 300, 200), noise(240_000, 1), backing, 1200)
        monitor.follow(guest)
        assert monitor.picture() == guest.backend.frame().pixels
        for seed in range(20):
            rect = Rect(seed * 7, seed * 5, 3 + seed * 3, 1 + seed)
            guest.draw(1, rect, noise(rect.width * rect.height * 4, seed), backing, 1200)
        monitor.follow(guest)
        assert monitor.picture() == guest.backend.frame().pixels
        other = guest.show(2, 100, 50, Format.X8B8G8R8)
        guest.draw(2, Rect(0, 0, 100, 50), noise(20_000, 3), other, 400)
        monitor.follow(guest)
        assert monitor.picture() == guest.backend.frame().pixels
        assert guest.unref(2) == OK
        monitor.follow(guest)
        assert monitor.picture() is None
        assert guest.set_scanout(0, 1, Rect(10, 10, 200, 100)) == OK
        monitor.follow(guest)
        assert monitor.picture() == guest.backend.frame().pixels


def test_a_page_flip_keeps_the_surface() -> None:
    """Two buffers of one size on one scanout: QEMU gets pixels, not a new surface every frame."""
    with GpuGuest() as guest, guest.monitor() as monitor:
        first, second = guest.show(1, 64, 48), guest.show(2, 64, 48)
        monitor.follow(guest)
        before = monitor.surfaces[0]
        for number, (resource, backing) in enumerate([(1, first), (2, second)] * 3):
            assert guest.set_scanout(0, resource, Rect(0, 0, 64, 48)) == OK
            guest.draw(resource, Rect(0, 0, 64, 48), noise(64 * 48 * 4, number), backing, 256)
            monitor.follow(guest)
            assert monitor.picture() == guest.backend.frame().pixels
        assert monitor.surfaces[0] is before


def test_a_slow_display_sees_fewer_frames_and_whole_messages() -> None:
    """Nothing is queued for a QEMU that does not read; when it reads again the newest picture arrives."""
    with GpuGuest(width=256, height=256, quota_bytes=4 << 20) as guest, guest.monitor() as monitor:
        backing = guest.show(1, 256, 256)
        for seed in range(12):
            guest.draw(1, Rect(0, 0, 256, 256), noise(256 * 256 * 4, seed), backing, 1024)
        assert guest.backend.screen.display.sent_bytes < 300 << 10
        monitor.read(1000)
        assert monitor.is_partial
        for corner in (Rect(0, 0, 9, 5), Rect(240, 250, 16, 6), Rect(100, 0, 3, 3)):
            guest.draw(1, corner, noise(corner.width * corner.height * 4, 77), backing, 1024)
        monitor.follow(guest)
        assert monitor.picture() == guest.backend.frame().pixels and not monitor.is_partial
        assert guest.backend.screen.display.error == ""


def test_a_turn_takes_32_commands_and_the_rest_wait_in_the_ring() -> None:
    """A full ring of transfers: other devices get their turn after 32, and nothing of the ring is lost."""
    with GpuGuest(width=64, height=64) as guest:
        backing = guest.show(1, 64, 64)
        picture = noise(64 * 64 * 4, 3)
        guest.ram.write(backing, picture)
        queue = guest.rig.queues[CONTROL]
        room = guest.ram.allocate(HEADER_BYTES)
        heads = []
        for row in range(64):
            rect = Rect(0, row, 64, 1)
            data = Header(Command.TRANSFER_TO_HOST_2D).pack() + TransferToHost2d(rect, row * 256, 1).pack()
            heads.append(queue.add([(guest.ram.put(data), len(data))], [(room, HEADER_BYTES)], indirect=True))
        before = queue.used_index
        queue.offer(heads)
        queue.kick()
        turns = []
        guest.target.loop.call_soon(lambda: turns.append(queue.used_index - before))
        while len(queue.reap()) < len(heads):
            guest.target.loop.step(0)
            turns.append(queue.used_index - before)
        assert 32 in turns and set(turns) <= {0, 32, 64}
        assert guest.backend.frame().pixels == picture
        assert guest.backend.snapshot()["denials"] == {}


def test_cursor_plane() -> None:
    """Shape, hot spot, place, hiding; the shape outlives its resource."""
    with GpuGuest(scanouts=2) as guest, guest.monitor() as monitor:
        backing = guest.ram.allocate(64 * 64 * 4, 4096)
        guest.keep()
        shape = noise(64 * 64 * 4, 2)
        guest.ram.write(backing, shape)
        assert guest.create(5, 64, 64, Format.B8G8R8A8) == OK
        assert guest.attach(5, [(backing, 64 * 64 * 4)]) == OK
        assert guest.transfer(5, Rect(0, 0, 64, 64)) == OK
        assert guest.cursor(Command.UPDATE_CURSOR, UpdateCursor(1, 10, 20, 5, 3, 4)) == OK
        monitor.follow(guest)
        assert monitor.cursors[1] == (10, 20, True) and monitor.shapes[1] == (3, 4, shape)
        assert guest.cursor(Command.MOVE_CURSOR, UpdateCursor(1, 11, 21, 0, 0, 0)) == OK
        assert guest.unref(5) == OK
        monitor.follow(guest)
        assert monitor.cursors[1] == (11, 21, True)
        shown = guest.backend.cursor(1)
        assert shown is not None and (shown.x, shown.y, shown.hot_x, shown.pixels) == (11, 21, 3, shape)
        assert guest.backend.cursor(0) is None
        assert guest.cursor(Command.UPDATE_CURSOR, UpdateCursor(1, 11, 21, 0, 0, 0)) == OK
        monitor.follow(guest)
        assert monitor.cursors[1] == (11, 21, False)
        # As Linux sends it: no room for an answer.
        data = Header(Command.MOVE_CURSOR).pack() + UpdateCursor(0, 1, 1, 0, 0, 0).pack()
        assert guest.raw(data, 0, queue=CURSOR) == b""


def test_quota_is_exact() -> None:
    """Pixels and backing lists fill the quota to the last page; what is freed can be had again at once."""
    pages = 16
    with GpuGuest(quota_bytes=pages * PAGE_BYTES) as guest:
        page = guest.ram.allocate(PAGE_BYTES, PAGE_BYTES)
        guest.keep()
        for number in range(1, pages):
            assert guest.create(number, 32, 32) == OK
        assert guest.backend.heap.used_bytes == (pages - 1) * PAGE_BYTES
        assert guest.attach(1, [(page, PAGE_BYTES)]) == OK
        assert guest.backend.heap.used_bytes == pages * PAGE_BYTES
        assert guest.create(99, 1, 1) == Answer.ERR_OUT_OF_MEMORY
        assert guest.attach(2, [(page, PAGE_BYTES)]) == Answer.ERR_OUT_OF_MEMORY
        assert guest.detach(1) == OK
        assert guest.create(99, 1, 1) == OK
        assert guest.unref(99) == OK
        for number in range(1, pages):
            assert guest.unref(number) == OK
        assert guest.backend.heap.used_bytes == 0
        assert os.fstat(guest.heap_fd).st_blocks == 0
        figures = guest.backend.snapshot()
        assert figures["denials"] == {"quota": 2}
        assert figures["operations"]["gpu.alloc"]["bytes"] == figures["operations"]["gpu.free"]["bytes"]


def test_a_driver_that_begins_anew_finds_nothing() -> None:
    """After a reset of the guest resource ids are free again; after a pause everything is still there."""
    with GpuGuest() as guest:
        guest.show(1, 64, 48)
        for index in (0, 1):
            base = guest.rig.frontend.stop(index)
            guest.rig.frontend.start(index, guest.rig.queues[index], base=base)
        assert guest.create(1, 8, 8) == Answer.ERR_INVALID_RESOURCE_ID
        for index in (0, 1):
            guest.rig.restart(index)
        assert guest.create(1, 8, 8) == OK
        assert guest.backend.heap.used_bytes == PAGE_BYTES


def test_the_frontend_leaves_and_another_comes() -> None:
    """A new session begins with an empty device and all memory."""
    with GpuGuest() as guest:
        guest.show(1, 64, 48)
        guest.rig.frontend.close()
        guest.rig.settle()
        assert guest.backend.heap.used_bytes == 0
        guest.rig.frontend = guest.target.connect()
        guest.rig.frontend.negotiate()
        guest.rig.frontend.set_memory(guest.ram)
        for index, queue in enumerate(guest.rig.queues):
            queue.reset()
            guest.rig.frontend.start(index, queue)
        assert guest.create(1, 64, 48) == OK


def test_the_display_may_come_and_go() -> None:
    """QEMU closes the display socket whenever the device stops; the next one gets the whole picture."""
    with GpuGuest() as guest:
        backing = guest.show(1, 64, 48)
        for seed in range(3):
            with guest.monitor() as monitor:
                guest.draw(1, Rect(0, 0, 64, 48), noise(64 * 48 * 4, seed), backing, 256)
                monitor.follow(guest)
                assert monitor.picture() == guest.backend.frame().pixels
                monitor.sock.send(b"whatever QEMU says")
                guest.rig.settle()
                assert guest.backend.screen.display.is_connected
            guest.rig.settle()
            assert not guest.backend.screen.display.is_connected


def test_display_socket_must_be_one() -> None:
    """Another kind of descriptor is refused and stays the caller's."""
    with GpuGuest() as guest:
        read, write = os.pipe()
        with pytest.raises(ProtocolError, match="no socket"):
            guest.backend.take_gpu_socket(read)
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 0}, "0x800"),
        ({"height": 5000}, "1280x5000"),
        ({"scanouts": 17}, "17 scanouts"),
        ({"quota_bytes": 5000}, "5000 bytes"),
    ],
)
def test_impossible_arguments_are_named(options: dict[str, int], sentence: str) -> None:
    loop = Loop()
    with pytest.raises(ConfigurationError, match=sentence):
        GpuBackend("gpu", loop, **options)  # type: ignore[arg-type]
    loop.close()


def test_the_gate_is_asked() -> None:
    """An operation whose bit is not set is denied for want of the capability, and nothing changes."""

    class NoReadback:
        def check(self, op: Op, size_bytes: int) -> Denial | None:
            return Denial.CAPABILITY if op is Op.GPU_READBACK else None

    loop = Loop()
    backend = GpuBackend("gpu", loop, gate=NoReadback())  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="denied"):
        backend.frame()
    assert backend.snapshot()["denials"] == {"capability": 1}
    backend.close()
    loop.close()

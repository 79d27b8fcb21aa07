"""The GPU's parts alone: heap, wire, EDID, pixel formats."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_devices.gpu import edid, wire
from rayos_devices.gpu.heap import PAGE_BYTES, Heap, pages_bytes
from rayos_devices.gpu.scanout import to_bgra

PAGES = 32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6 * PAGE_BYTES), st.integers(0, 99)), max_size=60))
def test_heap_accounts_exactly_and_never_overlaps(steps: list[tuple[bool, int, int]]) -> None:
    """Pieces are disjoint, zeroed and inside; used bytes are their sum; refusal means that no free range fits."""
    heap = Heap(None, PAGES * PAGE_BYTES)
    owner = [0] * PAGES
    pieces: dict[int, tuple[int, int]] = {}
    for number, (is_alloc, size, pick) in enumerate(steps, 1):
        if is_alloc:
            offset = heap.allocate(size)
            need = pages_bytes(size) // PAGE_BYTES
            if offset is None:
                free = "".join("." if o == 0 else "#" for o in owner)
                assert "." * need not in free
                continue
            pages = range(offset // PAGE_BYTES, offset // PAGE_BYTES + need)
            assert not any(owner[page] for page in pages)
            assert bytes(heap.view[offset : offset + size]) == bytes(size)
            heap.view[offset : offset + size] = b"\xaa" * size
            for page in pages:
                owner[page] = number
            pieces[number] = (offset, size)
        elif pieces:
            key = sorted(pieces)[pick % len(pieces)]
            heap.free(*pieces.pop(key))
            owner = [0 if o == key else o for o in owner]
        assert heap.used_bytes == PAGE_BYTES * sum(o != 0 for o in owner)
    for piece in pieces.values():
        heap.free(*piece)
    assert heap.used_bytes == 0
    assert heap.allocate(PAGES * PAGE_BYTES) == 0
    heap.close()


def test_heap_gives_pages_back_to_the_host() -> None:
    """Freed memory is the host's again, and reads as zeros."""
    fd = os.memfd_create("heap")
    heap = Heap(fd, 64 * PAGE_BYTES)
    offset = heap.allocate(64 * PAGE_BYTES)
    assert offset == 0
    heap.view[:] = b"\xff" * len(heap.view)
    assert os.fstat(fd).st_blocks * 512 == 64 * PAGE_BYTES
    heap.free(0, 64 * PAGE_BYTES)
    assert os.fstat(fd).st_blocks == 0
    assert not any(heap.view)
    heap.close()
    os.close(fd)


def test_heap_reserves_for_a_successor() -> None:
    """Reserved pieces keep their bytes, everything else is scrubbed, and a wrong piece is refused."""
    fd = os.memfd_create("heap")
    first = Heap(fd, 8 * PAGE_BYTES)
    a, b = first.allocate(PAGE_BYTES), first.allocate(2 * PAGE_BYTES)
    assert a is not None and b is not None
    first.view[:] = b"\x11" * len(first.view)
    second = Heap(fd, 8 * PAGE_BYTES)
    assert second.reserve(b, 2 * PAGE_BYTES)
    assert not second.reserve(b + PAGE_BYTES, PAGE_BYTES)
    assert not second.reserve(7 * PAGE_BYTES, 2 * PAGE_BYTES)
    second.scrub()
    assert bytes(second.view[b : b + 2 * PAGE_BYTES]) == b"\x11" * 2 * PAGE_BYTES
    assert not any(second.view[a : a + PAGE_BYTES])
    assert second.used_bytes == 2 * PAGE_BYTES
    for heap in (first, second):
        heap.close()
    os.close(fd)


@pytest.mark.parametrize("size", [0, -PAGE_BYTES, PAGE_BYTES + 1])
def test_heap_refuses_a_size_that_is_no_pages(size: int) -> None:
    with pytest.raises(ValueError, match="positive multiple"):
        Heap(None, size)


def test_wire_sizes_are_those_of_the_specification() -> None:
    """QEMU's build asserts the same ones (hw/display/virtio-gpu-base.c)."""
    header = wire.HEADER_BYTES
    assert header == 24
    assert header + wire.UpdateCursor.STRUCT.size == 56
    assert header + wire.ResourceId.STRUCT.size == 32
    assert header + wire.ResourceCreate2d.STRUCT.size == 40
    assert header + wire.SetScanout.STRUCT.size == 48
    assert header + wire.ResourceFlush.STRUCT.size == 48
    assert header + wire.TransferToHost2d.STRUCT.size == 56
    assert wire.MEMORY_ENTRY.size == 16
    assert wire.ENTRIES_OFFSET == 32
    assert wire.DISPLAY_INFO_BYTES == 408
    assert wire.EDID_BYTES == 1056
    assert wire.CONFIG.size == 20
    assert wire.MAX_COMMAND_BYTES == 56


@pytest.mark.parametrize(
    "command",
    [
        wire.ResourceCreate2d(1, 2, 3, 4),
        wire.ResourceId(7),
        wire.SetScanout(wire.Rect(1, 2, 3, 4), 5, 6),
        wire.ResourceFlush(wire.Rect(1, 2, 3, 4), 5),
        wire.TransferToHost2d(wire.Rect(1, 2, 3, 4), 1 << 40, 6),
        wire.AttachBacking(1, 2),
        wire.UpdateCursor(1, 2, 3, 4, 5, 6),
    ],
    ids=lambda command: type(command).__name__,
)
def test_commands_survive_the_wire(command: wire.ResourceId) -> None:
    assert type(command).unpack(bytes(wire.HEADER_BYTES) + command.pack()) == command


def test_answer_carries_the_fence_only_when_asked() -> None:
    fenced = wire.Header(wire.Command.GET_EDID, wire.FLAG_FENCE, 1 << 40, 3)
    assert wire.Header.unpack(fenced.answer(wire.Answer.OK_EDID)) == wire.Header(0x1104, 1, 1 << 40, 3)
    plain = wire.Header(wire.Command.GET_EDID, 0, 9, 3)
    assert wire.Header.unpack(plain.answer(wire.Answer.ERR_UNSPEC)) == wire.Header(0x1200)


def test_rect_geometry() -> None:
    a = wire.Rect(2, 2, 4, 4)
    assert a.intersection(wire.Rect(4, 4, 9, 9)) == wire.Rect(4, 4, 2, 2)
    assert a.intersection(wire.Rect(6, 2, 1, 1)) is None
    assert a.union(wire.Rect(0, 5, 1, 3)) == wire.Rect(0, 2, 6, 6)
    assert a.is_within(6, 6) and not a.is_within(5, 6)
    assert not wire.Rect(0xFFFFFFFF, 0, 2, 1).is_within(4, 4)
    assert not wire.Rect(0, 0, 0, 1).is_within(4, 4)


def test_edid_says_the_modes_of_every_monitor() -> None:
    """Established and standard timings (3.8, 3.9), unless the operator chose modes."""
    block = edid.build(1280, 800)
    assert (block[35] & 0b100001, block[36]) == (0b100001, 0b1000)
    ratios = (10 / 16, 3 / 4, 4 / 5, 9 / 16)
    standard = [(8 * (block[at] + 31), block[at + 1]) for at in range(38, 54, 2)]
    modes = [(width, round(width * ratios[rest >> 6]), 60 + (rest & 63)) for width, rest in standard]
    assert (1920, 1080, 60) in modes and (1280, 1024, 60) in modes and (1600, 1200, 60) in modes
    assert (1280, 720, 60) in modes and (1440, 900, 60) in modes and (2048, 1152, 60) in modes
    chosen = edid.build(1280, 800, [(640, 400)])
    assert chosen[35:38] == bytes(3) and chosen[38:54] == b"\1\1" * 8


@pytest.mark.parametrize(
    "mode", [(1280, 800), (1920, 1080), (3840, 2160), (1, 1), (edid.MAX_SIDE, edid.MAX_SIDE), (640, 480)]
)
def test_edid_says_the_chosen_mode(mode: tuple[int, int]) -> None:
    """Header, checksum and detailed timing, decoded by hand; edid-decode(1) passes the same blocks."""
    block = edid.build(*mode)
    assert len(block) == edid.BLOCK_BYTES and sum(block) % 256 == 0
    assert block[:8] == bytes.fromhex("00ffffffffffff00") and block[18:20] == b"\x01\x04"
    timing = block[54:72]
    width = timing[2] | timing[4] >> 4 << 8
    height = timing[5] | timing[7] >> 4 << 8
    assert (width, height) == mode
    (clock,) = struct.unpack_from("<H", timing)
    total = (width + timing[3] + ((timing[4] & 15) << 8)) * (height + timing[6] + ((timing[7] & 15) << 8))
    assert (clock > 0 and 1 <= clock * 10_000 / total <= 60.5) or mode == (1, 1)
    assert b"RayOS\n" in block


@pytest.mark.parametrize("mode", [(0, 1), (1, 0), (4096, 1), (1, 4096)])
def test_edid_refuses_what_it_cannot_say(mode: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="4095"):
        edid.build(*mode)


@pytest.mark.parametrize("format_", list(wire.Format))
def test_every_format_becomes_bgra(format_: wire.Format) -> None:
    """The format's name is its memory order."""
    letters = format_.name[0::2]
    values = {"B": 1, "G": 2, "R": 3, "A": 4, "X": 4}
    pixel = bytes(values[letter] for letter in letters)
    assert to_bgra(pixel * 3, format_) == bytes((1, 2, 3, 4)) * 3

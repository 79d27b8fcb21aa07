"""Scattered buffers: what is gathered and scattered is what one flat buffer would hold."""

from __future__ import annotations

import pytest

from rayos_devices.virtio.chain import Chain, gather, scatter, slice_views


def split(flat: bytearray, *sizes: int) -> list[memoryview]:
    views, done = [], 0
    for size in sizes:
        views.append(memoryview(flat)[done : done + size])
        done += size
    return views


SHAPES = [(8,), (1,) * 8, (0, 8), (3, 0, 5), (7, 1), (2, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", range(10))
@pytest.mark.parametrize("length", range(10))
def test_pieces_behave_as_one_buffer(shape: tuple[int, ...], offset: int, length: int) -> None:
    """gather, slice_views and scatter against the slice of a flat buffer."""
    flat = bytearray(b"abcdefgh")
    views = split(flat, *shape)
    assert gather(views, offset, length) == flat[offset : offset + length]
    assert b"".join(slice_views(views, offset, length)) == flat[offset : offset + length]
    data = b"0123456789"[:length]
    expected = bytearray(flat)
    room = max(0, min(length, len(flat) - offset))
    expected[offset : offset + room] = data[:room]
    assert scatter(views, offset, data) == room
    assert flat == expected


def test_sliced_views_are_not_copies() -> None:
    """They go to preadv."""
    flat = bytearray(8)
    for view in slice_views(split(flat, 3, 5), 2, 4):
        view[:] = b"x" * len(view)
    assert flat == b"\0\0xxxx\0\0"


def test_a_chain_reads_and_writes_its_own_halves() -> None:
    """read from the readable half, write into the writable one."""
    source, room = bytearray(b"request"), bytearray(4)
    chain = Chain(5, split(source, 3, 4), 7, split(room, 1, 3), 4)
    copy = chain.read(7)
    source[:] = b"changed"
    assert copy == b"request"
    assert chain.write(b"answer") == 4
    assert room == b"answ"
    assert chain.write(memoryview(b"zz"), 3) == 1
    assert room == b"ansz"
    assert chain.write(b"", 4) == 0

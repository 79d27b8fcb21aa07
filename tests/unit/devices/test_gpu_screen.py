"""The picture of a monitor: damage by serial, modes in EDID, the cursor over the picture."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_devices.errors import ConfigurationError, RequestError
from rayos_devices.gpu import edid
from rayos_devices.gpu.blend import blend
from rayos_devices.gpu.damage import KEPT, DamageLog
from rayos_devices.gpu.scanout import Cursor
from rayos_devices.gpu.wire import CURSOR_SIDE, DISPLAY_INFO_BYTES, DISPLAY_ONE, Command, Rect, UpdateCursor
from tests.framework.gpu import OK, GpuGuest

WHOLE = Rect(0, 0, 100, 100)


def covers(outer: Rect, inner: Rect) -> bool:
    return outer.union(inner) == outer


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 90), st.integers(1, 10)), max_size=2 * KEPT),
    st.data(),
)
def test_nobody_misses_a_change(changes: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Whatever serial is asked about: all that changed on that scanout since then is inside the answer."""
    log = DamageLog(2)
    made = []
    for scanout, at, size in changes:
        rect = Rect(at, at, size, size)
        log.add((scanout, rect))
        made.append((log.serial, scanout, rect))
    since, scanout = data.draw(st.integers(0, len(changes))), data.draw(st.integers(0, 1))
    later = [rect for serial, where, rect in made if serial > since and where == scanout]
    damage = log.since(since, scanout, WHOLE)
    if damage is None:
        assert not later
        return
    assert damage.serial == log.serial and all(covers(damage.rect, rect) for rect in later)
    assert log.since(damage.serial, scanout, WHOLE) is None


def test_a_successor_has_the_whole_picture_changed() -> None:
    """Of a serial that a predecessor gave, everything is new; and serials only rise."""
    log = DamageLog(1)
    log.add((0, Rect(1, 1, 1, 1)))
    successor = DamageLog(1)
    successor.next_generation(log.serial)
    assert successor.serial > log.serial
    damage = successor.since(log.serial, 0, WHOLE)
    assert damage is not None and damage == (successor.serial, WHOLE)
    assert successor.since(damage.serial, 0, WHOLE) is None


def test_a_flush_damages_where_it_is_shown() -> None:
    """Two monitors over one resource: each is told its own part, in its own pixels; a crash tells all again."""
    with GpuGuest(scanouts=2) as guest:
        guest.show(1, 64, 48)
        assert guest.set_scanout(0, 1, Rect(0, 0, 32, 48)) == OK
        assert guest.set_scanout(1, 1, Rect(32, 0, 32, 48)) == OK
        before = guest.backend.damage_serial
        assert guest.flush(1, Rect(30, 8, 4, 2)) == OK
        screen = guest.backend.screen
        assert screen.damage_since(before, 0) == (before + 1, Rect(30, 8, 2, 2))
        assert screen.damage_since(before, 1) == (before + 1, Rect(0, 8, 2, 2))
        assert screen.damage_since(before + 1, 1) is None
        with pytest.raises(RequestError, match="scanout 2: 0 to 1 are there"):
            screen.damage_since(0, 2)
        guest.crash()
        again = guest.backend.screen.damage_since(before + 1, 1)
        assert again is not None and again.serial > before + 1 and again.rect == Rect(0, 0, 32, 48)


def timings(blocks: bytes) -> list[tuple[int, int]]:
    """Every detailed timing's size, in the order in which the blocks have them."""
    found = [blocks[54:72]]
    for at in range(128, len(blocks), 128):
        extension = blocks[at : at + 128]
        assert extension[:3] == b"\x02\x03\x04" and sum(extension) % 256 == 0
        found += [extension[start : start + 18] for start in range(4, 112, 18) if extension[start]]
    return [(t[2] | t[4] >> 4 << 8, t[5] | t[7] >> 4 << 8) for t in found]


def test_edid_offers_more_modes() -> None:
    """As many as there is room for, the chosen one first and once."""
    modes = [(640 + 16 * step, 480 + 8 * step) for step in range(edid.MAX_MODES)]
    blocks = edid.build(1280, 800, modes)
    assert len(blocks) == 128 * 4 <= 1024 and blocks[126] == 3 and sum(blocks[:128]) % 256 == 0
    assert timings(blocks) == [(1280, 800), *modes]
    assert timings(edid.build(*modes[3], modes)) == [modes[3], *modes[:3], *modes[4:]]
    with pytest.raises(ValueError, match="at most 18"):
        edid.build(1280, 800, [*modes, (800, 600)])
    with pytest.raises(ConfigurationError, match="5000x10"), GpuGuest(modes=[(5000, 10)]):
        pass


def test_a_mode_outlives_the_worker() -> None:
    """The host's choice is in the display information, also of a successor; an impossible mode changes nothing."""

    def info(guest: GpuGuest) -> list[tuple[int, ...]]:
        answer = guest.command(Command.GET_DISPLAY_INFO, room=DISPLAY_INFO_BYTES)
        return list(DISPLAY_ONE.iter_unpack(answer.body))[:2]

    with GpuGuest(scanouts=2) as guest:
        guest.backend.resize(1, 1920, 1080)
        for width, height in ((0, 1), (4096, 1)):
            with pytest.raises(RequestError, match="1 to 4095"):
                guest.backend.resize(0, width, height)
        for _ in range(2):
            assert info(guest) == [(0, 0, 64, 48, 1, 0), (64, 0, 1920, 1080, 1, 0)]
            frame = guest.backend.frame(1)
            assert (frame.width, frame.height) == (1920, 1080)
            guest.crash()


@pytest.mark.parametrize(
    ("x", "y"), [(0, 0), (60, 40), (-10 & 0xFFFFFFFF, -63 & 0xFFFFFFFF), (10, 500), (1 << 31, 0)]
)
def test_a_cursor_blends_as_a_pixel_loop_would(x: int, y: int) -> None:
    """Premultiplied source over the picture, over every edge; what is outside changes nothing."""
    width, height = 80, 60
    under = bytes((n * 7) & 0xFF for n in range(width * height * 4))
    shape = bytes(
        min((p * 3 + c) & 0xFF, p & 0xFF) if c < 3 else p & 0xFF
        for p in range(CURSOR_SIDE**2)
        for c in range(4)
    )
    left, top = (v - (1 << 32) if v >> 31 else v for v in (x, y))
    expected = bytearray(under)
    for row in range(CURSOR_SIDE):
        for column in range(CURSOR_SIDE):
            if 0 <= left + column < width and 0 <= top + row < height:
                at = ((top + row) * width + left + column) * 4
                of = (row * CURSOR_SIDE + column) * 4
                alpha = shape[of + 3]
                for byte in range(3):
                    value = shape[of + byte] + expected[at + byte] * (255 - alpha) // 255
                    expected[at + byte] = min(255, value)
    assert blend(under, width, height, Cursor(x, y, 0, 0, shape)) == bytes(expected)


def test_a_picture_has_the_cursor_only_when_asked() -> None:
    with GpuGuest() as guest:
        guest.show(1, 64, 48)
        assert guest.create(5, 64, 64) == OK
        white = b"\xff" * 64 * 64 * 4
        backing = guest.ram.allocate(len(white), 4096)
        guest.keep()
        guest.ram.write(backing, white)
        assert guest.attach(5, [(backing, len(white))]) == OK
        assert guest.transfer(5, Rect(0, 0, 64, 64)) == OK
        assert guest.cursor(Command.UPDATE_CURSOR, UpdateCursor(0, 60, 40, 5, 0, 0)) == OK
        plain, drawn = guest.backend.frame(), guest.backend.frame(with_cursor=True)
        assert set(plain.pixels) == {0}
        assert drawn.pixels.count(b"\xff\xff\xff\0") == 4 * 8 and drawn.pixels[-4:] == b"\xff\xff\xff\0"

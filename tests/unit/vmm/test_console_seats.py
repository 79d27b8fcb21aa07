"""Consoles are shared: many watch, one writes, and who takes over is told to all."""

from __future__ import annotations

import pytest
import trio

from rayos_vmm.errors import Busy
from rayos_vmm.machine.seats import SEATS_MAXIMUM, Seats


def test_the_first_writes_the_second_watches_until_it_takes() -> None:
    seats = Seats()
    with seats.open(0, "ann") as ann:
        assert ann.is_writer and seats.describe(0) == {"writer": "ann", "watchers": 0}
        with seats.open(0, "bob") as bob, seats.open(1, "bob") as other_port:
            assert not bob.is_writer and bob.writer == "ann" and other_port.is_writer
            with seats.open(0, "eve", "take") as eve:
                assert eve.is_writer and not ann.is_writer and ann.writer == "eve"
            assert ann.writer is bob.writer is None  # nobody slips in unasked
            bob.take()
            assert bob.is_writer and seats.describe(0) == {"writer": "bob", "watchers": 1}
        with seats.open(0, "ann", "watch") as watching:
            assert not watching.is_writer and watching.writer is None
    assert seats.describe(0) == {"writer": None, "watchers": 0}


async def test_every_change_is_told_to_all() -> None:
    seats = Seats()
    with trio.fail_after(5), seats.open(0, "ann") as ann, seats.open(0, "bob") as bob:
        for seat in (ann, bob):
            await seat.changed()
        bob.take()
        await ann.changed()
        assert ann.writer == "bob"
        with trio.move_on_after(0) as nothing_new:
            await ann.changed()
        assert nothing_new.cancelled_caught


def test_so_many_seats_and_no_more() -> None:
    seats = Seats()
    opened = [seats.open(0, str(number), "watch") for number in range(SEATS_MAXIMUM)]
    for one in opened:
        one.__enter__()
    with pytest.raises(Busy, match="32 clients"), seats.open(0, "late"):
        pass
    for one in opened:
        one.__exit__(None, None, None)
    with seats.open(0, "ann") as ann:
        assert ann.is_writer

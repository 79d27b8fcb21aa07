"""Recordings: bounded, in order, ended with their machine; and what a broken replay lets go."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import trio

from rayos_devices.input.keymap import LAYOUTS
from rayos_vmm.cli.input import read_recording
from rayos_vmm.config.spec import Layout
from rayos_vmm.errors import Invalid
from rayos_vmm.machine.recording import RECORDINGS_MAXIMUM, WAITING_MAXIMUM, Held, Lagged, Recordings, Step


async def test_a_recorder_that_lags_loses_its_recording_alone() -> None:
    recordings = Recordings()
    with recordings.open() as slow, recordings.open() as quick:
        for number in range(WAITING_MAXIMUM + 1):
            recordings.note("mouse", [(2, 0, number)])
            assert (await anext(quick)).events == [(2, 0, number)]
        for _ in range(WAITING_MAXIMUM):
            await anext(slow)
        with pytest.raises(Lagged, match=f"more than {WAITING_MAXIMUM}"):
            await anext(slow)
        recordings.close()
        with pytest.raises(StopAsyncIteration):
            await anext(quick)


async def test_a_machine_has_so_many_recorders() -> None:
    recordings = Recordings()
    opened = [recordings.open() for _ in range(RECORDINGS_MAXIMUM)]
    for one in opened:
        one.__enter__()
    with pytest.raises(Lagged, match="8 recorders"), recordings.open():
        pass
    opened[0].__exit__(None, None, None)
    with recordings.open():
        await trio.lowlevel.checkpoint()


def test_what_is_held_is_let_go() -> None:
    """Keys and fingers that are still down, by device, and no others."""
    held = Held()
    held.note("keyboard", [(1, 42, 1), (1, 30, 1), (1, 30, 2), (1, 30, 0)])
    held.note("touch", [(3, 0x2F, 2), (3, 0x39, 7), (3, 0x2F, 3), (3, 0x39, 8), (1, 0x14A, 1)])
    held.note("touch", [(3, 0x39, -1)])
    assert held.releases() == [
        ("touch", [(3, 0x2F, 2), (3, 0x39, -1), (1, 0x14A, 0)]),
        ("keyboard", [(1, 42, 0)]),
    ]


def test_a_recording_is_read_or_refused_by_line(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    header = '{"format":"rayos-input","version":1,"vm":"dev"}\n'
    file.write_text(header + '{"t":0.5,"device":"keyboard","events":[[1,30,1]]}\n')
    assert read_recording(str(file)) == [Step(t=0.5, device="keyboard", events=[(1, 30, 1)])]
    for text, message in (
        ("", "does not begin with"),
        ('{"format":"rayos-input","version":2}\n', "does not begin with"),
        (header + '{"t":-1,"device":"keyboard","events":[]}\n', "line 2: .*>= 0"),
        (header + '{"t":0,"device":"keyboard","events":[[1]]}\n', "line 2"),
    ):
        file.write_text(text)
        with pytest.raises(Invalid, match=message):
            read_recording(str(file))
    with pytest.raises(Invalid, match="No such file"):
        read_recording(str(file) + ".none")


def test_the_layouts_that_may_be_asked_for_are_those_that_there_are() -> None:
    assert set(get_args(Layout)) == set(LAYOUTS)

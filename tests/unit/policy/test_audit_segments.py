"""The record over many files: one chain, of bounded size, that says what it left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_vmm.policy.audit import (
    LINE_MAXIMUM_BYTES,
    Anchor,
    Chain,
    Damage,
    Entry,
    Head,
    Operation,
    Verifier,
    fitted_data,
    verify,
)
from rayos_vmm.policy.audit_key import load_private
from rayos_vmm.policy.audit_log import AuditFailed, AuditLog, Room, open_audit
from rayos_vmm.policy.audit_segments import closed_segments
from rayos_vmm.policy.authority import read_clocks

SMALL = Room(segment_bytes=2000, kept=3)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=700) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=80) | st.dictionaries(st.text(max_size=600), inner, max_size=80),
    max_leaves=20,
)


async def fill(log: AuditLog, count: int) -> None:
    for number in range(count):
        await log.append(Operation.STATE, "a", n=number, pad="x" * 60)


def opened(directory: Path, room: Room = SMALL, **more: Any) -> Any:
    key = load_private(directory / "audit.key")
    return open_audit(directory / "audit.log", read_clocks, key.sign, key=key.public_key(), room=room, **more)


def every_line(directory: Path) -> list[bytes]:
    files = [path for _, path in closed_segments(directory / "audit.log")] + [directory / "audit.log"]
    return [line for path in files for line in path.read_bytes().splitlines(keepends=True)]


@given(data=st.dictionaries(st.text(max_size=50), ANYTHING, max_size=80), size=st.integers(0, 90_000))
@settings(max_examples=40, deadline=None)
def test_whatever_a_caller_puts_into_a_record_can_be_read_back(data: dict[str, Any], size: int) -> None:
    """F2: no length, depth, number or character makes a line that the reader refuses."""
    body = fitted_data({**data, "name": "\ud800" * size, "all": ["\x01" * 999] * size})
    line = Chain().add(Entry(seq=1, time=1.0, steady=1.0, op=Operation.STATE, data=body))
    assert len(line) <= LINE_MAXIMUM_BYTES
    assert Verifier().read(line).seq == 1


async def test_a_name_that_is_none_is_not_recorded_as_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        entry = await log.append(Operation.STATE, 'a"' * 40_000, why="b" * 70_000)
        assert entry.vm == "" and len(msgspec.json.encode(entry)) < 2500
        assert str(entry.data["no_name"]).endswith("79488 more")
    async with opened(tmp_path) as log:
        assert log.trouble == ""


async def test_segments_are_one_chain_and_the_oldest_go(tmp_path: Path) -> None:
    """Verified over all that are kept, by key and by anchor, in this service and the next."""
    async with opened(tmp_path) as log:
        await fill(log, 100)
        assert len(closed_segments(log.path)) == SMALL.kept
        key = load_private(tmp_path / "audit.key").public_key()
        found = verify(log.lines(), [log.anchor, Anchor(1, "00")], key)
        assert found.first > 1 and found.anchor == log.anchor
        assert len(b"".join(every_line(tmp_path))) < 5 * 2500
    async with opened(tmp_path, anchor=log.anchor) as log:
        assert log.trouble == "" and log.anchor.seq == found.anchor.seq + 1
        await fill(log, 30)
        assert verify(log.lines(), [log.anchor], key).first > found.first
    lines = every_line(tmp_path)
    assert verify(lines, key=key).anchor.seq == log.anchor.seq


async def test_a_segment_that_is_missing_or_changed_is_found(tmp_path: Path) -> None:
    """Also the oldest: the record says from where on it is kept."""
    async with opened(tmp_path) as log:
        await fill(log, 100)
    lines = every_line(tmp_path)
    starts = [at for at, line in enumerate(lines) if b'"op":"SEGMENT"' in line]
    for first, last in ((starts[1], starts[2]), (0, starts[1])):
        with pytest.raises(Damage):
            verify(lines[:first] + lines[last:])
    whole = [path for _, path in closed_segments(log.path)][-1].read_bytes()
    changed = whole.replace(b'"vm":"a"', b'"vm":"b"', 1)
    closed_segments(log.path)[-1][1].write_bytes(changed)
    async with opened(tmp_path) as log:
        assert "its digest does not follow" in log.trouble


@pytest.mark.parametrize("keep", [-1, 0, 40])
async def test_what_a_kill_leaves_of_a_turn_is_gone_on_from(tmp_path: Path, keep: int) -> None:
    """The next file is not there, is empty, or has a torn first record."""
    async with opened(tmp_path) as log:
        await fill(log, 12)
    path = tmp_path / "audit.log"
    first = next(Verifier().read(line).seq for line in path.read_bytes().splitlines(keepends=True)[:1])
    torn = path.read_bytes()[: max(keep, 0)]
    before = verify(every_line(tmp_path)[: -len(path.read_bytes().splitlines())])
    path.unlink()
    if keep >= 0:
        path.write_bytes(torn)
    async with opened(tmp_path, anchor=before.anchor) as log:
        assert log.trouble == "" and log.anchor == before.anchor
        await fill(log, 3)
    assert verify(every_line(tmp_path)).anchor.seq >= first + 3
    assert b'"op":"SEGMENT"' in path.read_bytes().splitlines()[0]


@pytest.mark.parametrize("step", ["rename", "open", "pwrite"])
async def test_a_disk_that_refuses_in_a_turn_loses_no_acknowledged_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Acknowledged records stay, refused ones are counted, and the record goes on."""

    def failing(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **more)

        return call

    is_full = False
    if step == "rename":
        monkeypatch.setattr(Path, "rename", failing(Path.rename, step))
    async with opened(tmp_path) as log:
        if step != "rename":
            monkeypatch.setattr(os, step, failing(getattr(os, step), step))
        acknowledged: list[int] = []
        for number in range(60):
            is_full = number % 20 >= 16
            try:
                acknowledged.append((await log.append(Operation.STATE, "a", pad="x" * 90)).seq)
            except AuditFailed:
                assert is_full
        is_full = False
        assert log.trouble == "" and len(acknowledged) >= 48
        await fill(log, 1)
        found = _numbers(log)
        assert set(acknowledged) <= set(found) | set(range(1, found[0]))
        assert sum(entry.lost for entry in log.ring) == log.lost


def _numbers(log: AuditLog) -> list[int]:
    verifier = Verifier()
    return [verifier.read(line).seq for line in log.lines()]


async def test_heads_are_told_at_checkpoints_and_at_the_end(tmp_path: Path) -> None:
    """Each on disk, signed, and with the end of the record behind it."""
    told: list[tuple[Head, Anchor]] = []
    news = trio.Event()

    async def keep(head: Head, end: Anchor) -> None:
        told.append((head, end))
        news.set()

    async with opened(tmp_path, Room(), keep=keep) as log:
        await fill(log, 300)
        await news.wait()
        assert told[0][0].seq <= 257 and told[0][1].seq > told[0][0].seq
    assert told[-1][1] == log.anchor and told[-1][0].seq == log.anchor.seq - 1
    key = load_private(tmp_path / "audit.key").public_key()
    assert verify(every_line(tmp_path), [head.anchor for head, _ in told], key).anchor == log.anchor
    with pytest.raises(Damage, match="cut off"):
        verify(every_line(tmp_path)[:-1], [told[-1][1]], key)

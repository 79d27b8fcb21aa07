"""A guest's output is bounded in memory and on disk, and readers learn what they missed."""

from __future__ import annotations

from pathlib import Path

from rayos_vmm.machine.history import BoundedFile, History, Lines


async def test_history_replays_jumps_and_ends() -> None:
    """Offsets are of the stream; a reader behind the kept part sees its offset jump."""
    history = History(size=16)
    for _ in range(10):
        history.write(b"0123456789")
    history.close()
    chunks = [chunk async for chunk in history.follow(0)]
    assert chunks[0][0] > 0
    assert chunks[-1][0] + len(chunks[-1][1]) == 100
    assert b"".join(data for _, data in chunks).endswith(b"0123456789")
    assert sum(len(data) for _, data in chunks) <= 32
    assert [chunk async for chunk in history.follow(None)] == []


def test_a_file_never_grows_beyond_its_limit(tmp_path: Path) -> None:
    """Two files of the limit at most, the newest bytes in the first."""
    file = BoundedFile(tmp_path / "log", limit=100)
    for index in range(50):
        file.write(b"%09d\n" % index)
    file.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"log", "log.1"}
    assert max(sizes.values()) <= 100
    assert (tmp_path / "log").read_bytes().endswith(b"000000049\n")


def test_lines_are_cut_at_line_ends_whatever_the_chunks() -> None:
    """Carriage returns go, invalid UTF-8 and endless lines do no harm."""
    lines: list[str] = []
    cutter = Lines(lines.append)
    for byte in b"one\r\ntwo\xff\nthr":
        cutter.write(bytes([byte]))
    cutter.write(b"x" * 100_000)
    cutter.write(b"\nend\n")
    assert lines[0] == "one"
    assert lines[1] == "two\ufffd"
    assert len(lines[2]) == 4096
    assert lines[3] == "end"


async def test_a_history_with_a_file_gives_every_byte_of_a_long_output(tmp_path: Path) -> None:
    """However far behind a reader is, as long as the files hold it; and again after the end, by another service."""
    history, written = History(size=64), b"".join(b"line %d\n" % number for number in range(500))
    history.keep_in(BoundedFile(tmp_path / "log", limit=4096))
    for at in range(0, len(written), 7):
        history.write(written[at : at + 7])
    history.close()
    read = [chunk async for chunk in history.follow(0)]
    assert read[0][0] == 0
    assert b"".join(data for _, data in read) == written
    assert [chunk async for chunk in history.follow(len(written) - 3)] == [(len(written) - 3, written[-3:])]
    later = History(size=64)
    later.keep_in(BoundedFile(tmp_path / "log", limit=4096, is_continued=True))
    later.close()
    assert b"".join([data async for _, data in later.follow(0)]) == written


async def test_a_second_run_starts_at_offset_zero_behind_the_first(tmp_path: Path) -> None:
    for run in (b"first\n", b"second\n"):
        history = History()
        history.keep_in(BoundedFile(tmp_path / "log"))
        history.write(run)
        history.close()
        assert [chunk async for chunk in history.follow(0)] == [(0, run)]
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\n"


async def test_what_the_files_dropped_is_a_jump_and_nothing_else(tmp_path: Path) -> None:
    history = History(size=16)
    history.keep_in(BoundedFile(tmp_path / "log", limit=100))
    for number in range(100):
        history.write(b"%09d\n" % number)
    history.close()
    read = [chunk async for chunk in history.follow(0)]
    assert read[0][0] >= 800
    assert b"".join(data for _, data in read).endswith(b"000000099\n")
    assert sum(len(data) for _, data in read) == 1000 - read[0][0]

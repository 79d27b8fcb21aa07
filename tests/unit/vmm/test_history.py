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

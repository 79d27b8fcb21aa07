"""The files that the record is kept in: `audit.log`, which grows, and the segments before it, which do not change.

A segment that is full is renamed to `audit-N.log`, N being the number of its first record, so that names sort as
records follow. Invariant: what `write` returned from is on disk (fdatasync), and `durable` is the last record that is.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from rayos_vmm.policy.audit import LINE_MAXIMUM_BYTES, Anchor, Entry, Operation

_DIGITS: Final = 12


class Unsure(OSError):
    """It is not known what of the last lines is on disk: nothing more may be written."""


class Segments:
    """The open end of the record. Every method blocks; one caller at a time."""

    def __init__(self, path: Path, first: int, durable: Anchor, size: int) -> None:
        self.path = path
        self.first = first  # number of the first record of the open segment
        self.durable = durable
        self.size = size  # of the open segment, in bytes
        self._fd = _open(path)
        os.ftruncate(self._fd, size)  # a torn last line was never acknowledged

    def close(self) -> None:
        """Closes the file. Safe to call again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def write(self, batch: Sequence[tuple[Entry, bytes, Anchor]]) -> None:
        """Appends lines; a SEGMENT record begins another file, and removes those before its `kept_from`.

        Raises:
            OSError: it is written up to `durable`, and cut back to that.
        Unsure: it is not known how far it is written.
        """
        part: list[bytes] = []
        end = self.durable
        kept_from = 0
        for entry, line, anchor in batch:
            if entry.op is Operation.SEGMENT:
                self._put(part, end)
                part = []
                self._turn(entry.seq)
                kept_from = int(entry.data["kept_from"])
            part.append(line)
            end = anchor
        self._put(part, end)
        for first, path in closed_segments(self.path) if kept_from else ():
            if first < kept_from:
                path.unlink()

    def _put(self, lines: Sequence[bytes], end: Anchor) -> None:
        data, done = b"".join(lines), 0
        try:
            while done < len(data):
                done += os.pwrite(self._fd, memoryview(data)[done:], self.size + done)
        except OSError as error:
            try:
                os.ftruncate(self._fd, self.size)
            except OSError:
                raise Unsure(error.errno, f"{error.strerror}, and it cannot be cut back") from None
            raise
        try:
            os.fdatasync(self._fd)
        except OSError as error:  # what the kernel dropped cannot be told from what it wrote
            raise Unsure(error.errno, f"fdatasync: {error.strerror}") from None
        self.size += done
        self.durable = end

    def _turn(self, first: int) -> None:
        if self.size:
            beside = self.path.with_name(f"{self.path.name}.new")
            fd = _open(beside)
            try:
                self.path.rename(_closed(self.path, self.first))
            except OSError:
                os.close(fd)
                raise
            os.close(self._fd)
            self._fd, self.size = fd, 0
            try:
                beside.rename(self.path)
                _sync_directory(self.path.parent)
            except OSError as error:
                raise Unsure(error.errno, f"{self.path} cannot be begun: {error.strerror}") from None
        self.first = first

    def begin_anew(self, folder: Path, end: Anchor) -> None:
        """Moves every file into `folder` as it is, and goes on behind `end` in an empty one. Raises OSError."""
        folder.mkdir(mode=0o700)
        for path in [*(path for _, path in closed_segments(self.path)), self.path]:
            if path.exists():
                path.rename(folder / path.name)
        fd = _open(self.path)
        self.close()
        self._fd, self.size, self.durable, self.first = fd, 0, end, end.seq + 1
        _sync_directory(self.path.parent)

    def lines(self) -> Generator[bytes, None, None]:
        """Yields every line that is on disk now, of all segments, oldest first; may be read while others write."""
        closed = [path for _, path in closed_segments(self.path)]
        return _lines(closed, self.path, _closed(self.path, self.first), self.size)


def _lines(closed: Sequence[Path], path: Path, later: Path, size: int) -> Generator[bytes, None, None]:
    for one in closed:
        yield from read_lines(one)
    with path.open("rb") as current:
        if not later.exists():
            yield from _read(current, size)
            return
    yield from read_lines(later, size)  # it was closed meanwhile


def closed_segments(path: Path) -> list[tuple[int, Path]]:
    """The segments before the open one at `path`, oldest first, each with the number of its first record."""
    found = path.parent.glob(f"{path.stem}-{'[0-9]' * _DIGITS}{path.suffix}")
    return sorted((int(one.stem[-_DIGITS:]), one) for one in found)


def read_lines(path: Path, size: int | None = None) -> Iterator[bytes]:
    """Lines of a file, up to `size` bytes; none longer than a record can be, so a damaged file costs no memory."""
    with path.open("rb") as file:
        yield from _read(file, size)


def _read(file: BinaryIO, size: int | None) -> Iterator[bytes]:
    while size is None or file.tell() < size:
        line = file.readline(LINE_MAXIMUM_BYTES + 1)
        if not line:
            return
        yield line


def _closed(path: Path, first: int) -> Path:
    return path.with_name(f"{path.stem}-{first:0{_DIGITS}}{path.suffix}")


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

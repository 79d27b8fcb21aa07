"""The output of a guest or of QEMU: the newest bytes in memory for readers, all of it in a bounded pair of files.

Invariant: whatever is written, memory holds at most twice `size` bytes and the disk twice the file's limit. A reader
that fell behind reads from the files; one behind those too sees the offset jump. The writer never waits for anybody.
"""

from __future__ import annotations

import os
import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Final

import trio

HISTORY_BYTES: Final = 256 << 10
FILE_BYTES: Final = 1 << 20
#: Of a console's output: so much is kept at least, twice that at most.
CONSOLE_FILE_BYTES: Final = 128 << 20
LINE_MAXIMUM_BYTES: Final = 4096
#: Times kept, and what counts as the same one.
MARKS: Final = 32768
MERGE_NS: Final = 1_000_000
_CHUNK_BYTES: Final = 64 << 10


class BoundedFile:
    """A file that starts over when it is full and keeps the one before as `.1`; both are read by offset.

    Offset 0 is where this object began to write, so what was in the files before has negative offsets; with
    `is_continued` offset 0 is the oldest byte that they hold.
    """

    def __init__(self, path: Path, *, limit: int = FILE_BYTES, is_continued: bool = False) -> None:
        self._path = path
        self._older = path.with_name(path.name + ".1")
        self._limit = limit
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        older = self._older.stat().st_size if self._older.exists() else 0
        self._begin = older if is_continued else -self._size  # of the newer file
        self._oldest = self._begin - older

    @property
    def oldest(self) -> int:
        """The offset of the oldest byte that can be read."""
        return self._oldest

    @property
    def end(self) -> int:
        """The offset behind the newest byte."""
        return self._begin + self._size

    def write(self, data: bytes) -> None:
        """Appends; a full disk costs the log, not the guest."""
        if self._size + len(data) > self._limit and self._size:
            self._file.close()
            self._path.replace(self._older)
            self._file = self._path.open("wb", buffering=0)
            self._oldest, self._begin, self._size = self._begin, self.end, 0
        kept = data[-self._limit :]
        try:
            written = self._file.write(kept)
        except OSError:
            written = 0
        if written == len(data):
            self._size += written
        else:
            self._start_over(self.end + len(data))

    def _start_over(self, offset: int) -> None:
        """Forgets what was kept, for a byte in the middle is missing."""
        os.ftruncate(self._file.fileno(), 0)
        self._older.unlink(missing_ok=True)
        self._oldest, self._begin, self._size = offset, offset, 0

    def read(self, offset: int, limit: int) -> bytes:
        """Up to `limit` bytes from `offset` on; empty where none are kept."""
        if not self._oldest <= offset < self.end:
            return b""
        path, begin = (self._path, self._begin) if offset >= self._begin else (self._older, self._oldest)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset - begin)
                return file.read(limit)
        except OSError:
            return b""

    def close(self) -> None:
        """No more is written; what was can still be read."""
        self._file.close()


class History:
    """The output of one stream, by offset from its start.

    Args:
        size: bytes kept in memory.
    """

    def __init__(self, *, size: int = HISTORY_BYTES) -> None:
        self._size = size
        self._file: BoundedFile | None = None
        self._data = bytearray()
        self._end = 0
        self._marks: deque[tuple[int, int]] = deque(maxlen=MARKS)
        self._news = trio.Event()
        self._is_closed = False

    @property
    def end(self) -> int:
        """The offset behind the newest byte."""
        return self._end

    def keep_in(self, file: BoundedFile) -> None:
        """Has everything that is still to come written to `file`, and read from there; what it holds is the past.

        The history closes the file at its own end. Call this before the first `write`.
        """
        self._file = file
        self._end = max(0, file.end)

    def write(self, data: bytes) -> None:
        """Appends; drops the oldest bytes beyond the size."""
        now = time.time_ns()
        if not self._marks or now >= self._marks[-1][1] + MERGE_NS:
            self._marks.append((self._end, now))
        if self._file is not None:
            self._file.write(data)
        self._data += data
        self._end += len(data)
        if len(self._data) > 2 * self._size:
            del self._data[: len(self._data) - self._size]
        self._wake()

    def close(self) -> None:
        """No more will come: readers end when they have read all."""
        self._is_closed = True
        if self._file is not None:
            self._file.close()
        self._wake()

    def tail(self, limit: int = 4096) -> bytes:
        """The newest bytes."""
        return bytes(self._data[-limit:])

    def marks(self, start: int, end: int) -> list[tuple[int, int]]:
        """(offset, nanoseconds since the epoch): when the bytes from `start` to `end` came, as `cut` wants them."""
        first = bisect_right(self._marks, (start, sys.maxsize)) - 1
        return [mark for mark in list(self._marks)[max(0, first) :] if mark[0] < end]

    async def follow(self, since: int | None = None) -> AsyncGenerator[tuple[int, bytes], None]:
        """(offset, bytes) from `since` on (None: from now), live, until the stream is closed."""
        position = self._end if since is None else since
        while True:
            start = self._end - len(self._data)
            chunk = b""
            if self._file is not None and position < start:
                position = max(position, min(self._file.oldest, start), 0)
                chunk = self._file.read(position, min(_CHUNK_BYTES, max(0, start - position)))
            if not chunk:
                position = min(max(position, start), self._end)
                chunk = bytes(self._data[position - start : position - start + _CHUNK_BYTES])
            if chunk:
                yield position, chunk
                position += len(chunk)
            elif self._is_closed:
                return
            else:
                await self.changed()

    async def changed(self) -> None:
        """Returns when more has come, or the end."""
        await self._news.wait()

    def _wake(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()


class Lines:
    """Cuts a byte stream into lines for a callback; over-long lines are cut short."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = bytearray()

    def write(self, data: bytes) -> None:
        """Calls back for every line that is now complete, without its line end."""
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest[:LINE_MAXIMUM_BYTES]
        for line in lines:
            text = bytes(line[:LINE_MAXIMUM_BYTES]).decode("utf-8", "replace").strip("\r")
            self._on_line(text)

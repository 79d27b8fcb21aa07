"""The output of a guest or of QEMU: the last bytes in memory for readers, a bounded pair of files for people.

Invariant: whatever is written, memory holds at most `size` bytes and the disk twice `file_bytes`; a reader
that fell behind sees the offset jump, and the writer never waits for anybody.
"""

from __future__ import annotations

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
LINE_MAXIMUM_BYTES: Final = 4096
#: Times kept, and what counts as the same one.
MARKS: Final = 32768
MERGE_NS: Final = 1_000_000
_CHUNK_BYTES: Final = 64 << 10


class History:
    """The last bytes of a stream, by offset from its start."""

    def __init__(self, *, size: int = HISTORY_BYTES) -> None:
        self._size = size
        self._data = bytearray()
        self._end = 0
        self._marks: deque[tuple[int, int]] = deque(maxlen=MARKS)
        self._news = trio.Event()
        self._is_closed = False

    @property
    def end(self) -> int:
        """The offset behind the newest byte."""
        return self._end

    def write(self, data: bytes) -> None:
        """Appends; drops the oldest bytes beyond the size."""
        now = time.time_ns()
        if not self._marks or now >= self._marks[-1][1] + MERGE_NS:
            self._marks.append((self._end, now))
        self._data += data
        self._end += len(data)
        if len(self._data) > 2 * self._size:
            del self._data[: len(self._data) - self._size]
        self._wake()

    def close(self) -> None:
        """No more will come: readers end when they have read all."""
        self._is_closed = True
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
            position = min(max(position, start), self._end)
            chunk = bytes(self._data[position - start : position - start + _CHUNK_BYTES])
            if chunk:
                yield position, chunk
                position += len(chunk)
            elif self._is_closed:
                return
            else:
                await self._news.wait()

    def _wake(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()


class BoundedFile:
    """A file that starts over when it is full and keeps the one before as `.1`."""

    def __init__(self, path: Path, *, limit: int = FILE_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()

    def write(self, data: bytes) -> None:
        """Appends; a full disk costs the log, not the guest."""
        if self._size + len(data) > self._limit and self._size:
            self._file.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._file = self._path.open("wb", buffering=0)
            self._size = 0
        try:
            self._size += self._file.write(data[-self._limit :])
        except OSError:
            self._size = self._limit

    def close(self) -> None:
        self._file.close()


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

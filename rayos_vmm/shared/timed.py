"""Output with the times at which it came: pieces, whose bytes put together are the output byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that came at `time` (seconds since the epoch); `offset` is the first one's, from the output's beginning."""

    offset: int
    time: float
    data: bytes


def cut(start: int, data: bytes, marks: Sequence[tuple[int, int]]) -> Iterator[Span]:
    """Cuts `data`, which begins at offset `start`, by marks (offset, nanoseconds). Bytes before the first mark have
    its time as well, as older times are forgotten.
    """
    if not data:
        return
    end = start + len(data)
    edges = [
        (start, marks[0][1] if marks else 0),
        *((at, ns) for at, ns in marks if start < at < end),
        (end, 0),
    ]
    for (at, ns), (until, _) in pairwise(edges):
        yield Span(offset=at, time=ns / 1e9, data=data[at - start : until - start])

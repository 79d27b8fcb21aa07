"""Requests that may arrive twice, done once.

Who asks a worker that is killed before it answers cannot know whether the request was done, and asks its successor
again with the same token. The last few tokens and results are part of the device's saved state, so the successor knows.
"""

from __future__ import annotations

import struct
from typing import Final

#: Requests that may be unanswered at a time: the service has a handful of connections with one each.
REMEMBERED: Final = 16
_ENTRY: Final = struct.Struct("<QI")


class IdempotentResults:
    """Results by token, the last REMEMBERED ones. Token 0 is never remembered: a request that is not repeated."""

    STATE_BYTES: Final = REMEMBERED * _ENTRY.size

    def __init__(self) -> None:
        self._results: dict[int, int] = {}

    def find(self, token: int) -> int | None:
        """The result of the request, if it was done."""
        return self._results.get(token) if token else None

    def remember(self, token: int, result: int) -> None:
        """`result` is unsigned, of 32 bits. A token that is no unsigned number of 64 bits is not remembered."""
        if not 0 < token < 1 << 64:
            return
        if len(self._results) >= REMEMBERED:
            del self._results[next(iter(self._results))]
        self._results[token] = result

    def pack(self) -> bytes:
        packed = b"".join(_ENTRY.pack(token, result) for token, result in self._results.items())
        return packed.ljust(self.STATE_BYTES, b"\0")

    def unpack(self, data: bytes) -> None:
        self._results = {token: result for token, result in _ENTRY.iter_unpack(data) if token}

"""A guest's console for a test: say something, expect something.

Patterns are matched against the text without control sequences; a CR before LF goes (`shared/console_text.py`).

Invariant: no byte is lost between two calls, and no task runs between them. The daemon keeps the console's
history; `expect` reads on from where the last one stopped.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from contextlib import suppress
from typing import Final

import trio

from rayos_vmm.client.client import Client
from rayos_vmm.errors import GuestGone, RayosError, Timeout_
from rayos_vmm.shared.console_text import complete_bytes, fold

TIMEOUT_S: Final = 60.0
#: Of what a guest said, so much stands in an error.
SHOWN_CHARACTERS: Final = 2000
SHOWN_LINES: Final = 12
ENDING_S: Final = 1.0
#: A match that is longer may be missed.
OVERLAP_BYTES: Final = 64 << 10

Pattern = str | re.Pattern[str]


class NotSeen(AssertionError):
    """The expected text did not come; the message says what did."""


def last_lines(text: str) -> str:
    """Returns the end of `text`, as much as an error shows of it."""
    return "\n".join(text[-SHOWN_CHARACTERS:].rstrip().splitlines()[-SHOWN_LINES:])


def to_pattern(wanted: Pattern) -> re.Pattern[str]:
    """A string means itself, a compiled pattern is used as it is."""
    return re.compile(re.escape(wanted)) if isinstance(wanted, str) else wanted


def _inline(pattern: re.Pattern[str]) -> str:
    """A pattern with its flags inside, as a part of another."""
    letters = "".join(
        letter
        for letter, flag in (("i", re.I), ("m", re.M), ("s", re.S), ("x", re.X))
        if pattern.flags & flag
    )
    return f"(?{letters}:{pattern.pattern})"


class _Window:
    """The newest output, looked through once: `OVERLAP_BYTES` of it are looked at again with the next chunk."""

    def __init__(self, pattern: re.Pattern[str], start: int) -> None:
        self._pattern = pattern
        self._start = start  # offset of the first byte that is kept
        self._kept = b""

    def text(self) -> str:
        return fold(self._kept).decode(errors="replace")

    def feed(self, data: bytes, offset: int) -> tuple[re.Match[str], int] | None:
        """The first match in what is kept and `data`, which begins at `offset`; and the offset behind it."""
        if not self._kept or offset != self._start + len(self._kept):  # after a gap nothing goes on
            self._start, self._kept = offset, b""
        self._kept += data
        match = self._pattern.search(_text(self._kept))
        if match is not None:
            behind = bisect_left(
                range(len(self._kept)), match.end(), key=lambda end: len(_text(self._kept[:end]))
            )
            return match, self._start + behind
        cut = self._kept.rfind(b"\n", 0, max(0, len(self._kept) - OVERLAP_BYTES)) + 1
        cut = max(cut, len(self._kept) - 2 * OVERLAP_BYTES)
        self._start, self._kept = self._start + cut, self._kept[cut:]
        return None


def _text(data: bytes) -> str:
    return fold(data[: complete_bytes(data)]).decode(errors="surrogateescape")


class GuestConsole:
    """One port of one guest. `position` is the offset behind the last match."""

    def __init__(self, client: Client, name: str, port: int) -> None:
        self._client = client
        self._name = name
        self._port = port
        self.position = 0

    async def expect(self, wanted: Pattern, *, timeout: float = TIMEOUT_S) -> re.Match[str]:
        """Waits until the console has said `wanted` since the last match; returns the match.

        Raises:
            NotSeen: it did not within `timeout` seconds, or the console ended; with what it said instead.
        """
        match, self.position = await self.search(wanted, since=self.position, timeout=timeout)
        return match

    async def expect_any(self, *wanted: Pattern, timeout: float = TIMEOUT_S) -> tuple[int, re.Match[str]]:
        """Waits until the console has said one of `wanted` since the last match; returns which, and the match.

        Of several in the same text the first in it counts, of several at one place the first that was named. A
        pattern with groups has them in the match, behind those of the patterns before it.

        Raises:
            NotSeen: none came within `timeout` seconds, or the console ended; with what it said instead.
        """
        groups = [f"(?P<any{index}>{_inline(to_pattern(one))})" for index, one in enumerate(wanted)]
        match = await self.expect(re.compile("|".join(groups)), timeout=timeout)
        return next(index for index in range(len(wanted)) if match[f"any{index}"] is not None), match

    async def search(self, wanted: Pattern, *, since: int, timeout: float) -> tuple[re.Match[str], int]:
        """The first match from offset `since` on, and the offset behind it.

        Raises:
            NotSeen: there was none within `timeout` seconds, or the console ended.
        """
        window, why = _Window(to_pattern(wanted), since), ""
        with trio.move_on_after(timeout) as limit:
            try:
                async with self._client.console(self._name, self._port, since=since, mode="watch") as console:
                    while data := await console.read():
                        found = window.feed(data, console.offset - len(data))
                        if found is not None:
                            return found
                why = f"the console ended: {await self._ending()}"
            except GuestGone as error:
                why = error.message
        if limit.cancelled_caught:
            why = f"not within {timeout:g} s"
        shown = last_lines(window.text())
        raise NotSeen(f"{self._name}: {wanted!r} was not seen: {why}; it said:\n{shown}")

    async def _ending(self) -> str:
        """Why a console says no more: the state of its machine, and the reason."""
        try:
            with suppress(Timeout_):  # a console ends a moment before its machine
                await self._client.wait(self._name, "stopped", timeout_s=ENDING_S)
            view = await self._client.get(self._name)
        except RayosError as error:
            return error.message
        return f"{view.state.value}: {view.reason}" if view.reason else view.state.value

    async def send(self, text: str | bytes) -> None:
        """Types into the console; end a line with `\\n` to have a shell run it.

        Raises:
            Conflict: somebody else writes there.
        """
        data = text.encode() if isinstance(text, str) else text
        await self._client.console_write(self._name, self._port, data)

    async def text(self) -> str:
        """All that is kept of what it said; empty when the console cannot be read any more."""
        try:
            return (await self._client.console_log(self._name, self._port)).decode(errors="replace")
        except RayosError:
            return ""

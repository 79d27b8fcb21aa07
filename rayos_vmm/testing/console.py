"""A guest's console for a test: say something, expect something.

Invariant: no byte is lost between two calls, and no task runs between them. The daemon keeps the console's
history; `expect` reads on from where the last one stopped.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Final

import trio

from rayos_vmm.client.client import Client
from rayos_vmm.errors import GuestGone, RayosError, Timeout_

TIMEOUT_S: Final = 60.0
SHOWN_CHARACTERS: Final = 2000
ENDING_S: Final = 1.0

Pattern = str | re.Pattern[str]


class NotSeen(AssertionError):
    """The expected text did not come; the message says what did."""


def to_pattern(wanted: Pattern) -> re.Pattern[str]:
    """A string means itself, a compiled pattern is used as it is."""
    return re.compile(re.escape(wanted)) if isinstance(wanted, str) else wanted


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

    async def search(self, wanted: Pattern, *, since: int, timeout: float) -> tuple[re.Match[str], int]:
        """The first match from offset `since` on, and the offset behind it.

        Raises:
            NotSeen: there was none within `timeout` seconds, or the console ended.
        """
        pattern, said, start, why = to_pattern(wanted), bytearray(), since, ""
        with trio.move_on_after(timeout) as limit:
            try:
                async with self._client.console(self._name, self._port, since=since, mode="watch") as console:
                    while data := await console.read():
                        start = max(start, console.offset - len(data)) if not said else start
                        said += data
                        match = pattern.search(said.decode(errors="surrogateescape"))
                        if match is not None:
                            before = match.string[: match.end()].encode(errors="surrogateescape")
                            return match, start + len(before)
                why = f"the console ended: {await self._ending()}"
            except GuestGone as error:
                why = error.message
        if limit.cancelled_caught:
            why = f"not within {timeout:g} s"
        shown = said.decode(errors="replace")[-SHOWN_CHARACTERS:]
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

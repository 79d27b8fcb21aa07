"""A line that says what is being waited for, once that takes longer than a second.

On a terminal one line is redrawn with the time that passed; elsewhere each stage is a plain line. Standard
error only, so that results stay clean.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from rayos_vmm.cli.output import Output
from rayos_vmm.errors import one_error

PATIENCE_S: Final = 1.0
REDRAW_S: Final = 0.1
CLEAR_LINE: Final = "\r\x1b[K"  # ECMA-48, 8.3.41: erase in line


class Progress:
    """The line. Use `open_progress`."""

    def __init__(self, text: str, *, is_terminal: bool, is_quiet: bool) -> None:
        self._text = text
        self._is_terminal = is_terminal
        self._is_quiet = is_quiet
        self._started = trio.current_time()
        self._is_drawn = False

    def stage(self, text: str) -> None:
        """Names the stage that begins now."""
        self._text = text
        if self._is_drawn:
            self.show()

    def done(self, text: str) -> None:
        """Something that is finished, and stays on the screen."""
        if self._is_quiet:
            return
        self.clear()
        print(f"  {text}", file=sys.stderr, flush=True)

    def show(self) -> None:
        """Draws the line as it is now."""
        if self._is_quiet:
            return
        self._is_drawn = True
        if self._is_terminal:
            elapsed = trio.current_time() - self._started
            sys.stderr.write(f"{CLEAR_LINE}  {self._text} … {elapsed:.1f} s")
            sys.stderr.flush()
        else:
            print(f"  {self._text} …", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes the line away."""
        if self._is_drawn and self._is_terminal and not self._is_quiet:
            sys.stderr.write(CLEAR_LINE)
            sys.stderr.flush()

    async def tick(self) -> None:
        """Redraws; never returns."""
        await trio.sleep(PATIENCE_S)
        self.show()
        while self._is_terminal:
            await trio.sleep(REDRAW_S)
            self.show()
        await trio.sleep_forever()


@asynccontextmanager
async def open_progress(text: str, out: Output) -> AsyncIterator[Progress]:
    """The line while the block runs; gone at its end."""
    progress = Progress(text, is_terminal=sys.stderr.isatty(), is_quiet=out.is_json)
    with one_error():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(progress.tick)
            try:
                yield progress
            finally:
                progress.clear()
                nursery.cancel_scope.cancel()

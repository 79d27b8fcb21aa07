"""This terminal as the guest's: keys go in as they are, bytes come out as they are, Ctrl-] leaves.

The end of an input that is no terminal (`</dev/null`, a closed descriptor, a pipe) is not the end of the session unless
the caller says so, and never when nothing was read.

While somebody else writes it only watches, and Ctrl-T takes over; whoever wrote is told. Invariant: whatever happens,
the terminal's settings are what they were before.
"""

from __future__ import annotations

import enum
import os
import signal
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from rayos_vmm.client.console import Console
from rayos_vmm.errors import Conflict, GuestGone
from rayos_vmm.shared.console_text import Finder

DETACH: Final = b"\x1d"  # Ctrl-]
TAKE: Final = b"\x14"  # Ctrl-T, while watching
READ_BYTES: Final = 4096
# After the end of an input that is no terminal, what the guest still answers to it.
LAST_WORDS_S: Final = 0.5


class Ending(enum.Enum):
    """How the time at the console ended."""

    DETACHED = "detached"
    INPUT_ENDED = "input ended"
    CONSOLE_ENDED = "console ended"
    TEXT_SEEN = "text seen"


@contextmanager
def raw_terminal(fd: int, *, keeps_signals: bool = False) -> Iterator[None]:
    """The terminal without line editing, echo and signals; nothing is changed where `fd` is no terminal.

    With `keeps_signals` Ctrl-C is still a signal, and output is processed as before.
    """
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        (tty.setcbreak if keeps_signals else tty.setraw)(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


async def read_input(fd: int) -> bytes:
    """The next bytes of a terminal, pipe or file; empty at its end."""
    try:
        await trio.lowlevel.wait_readable(fd)
    except PermissionError:  # a regular file: always readable (epoll_ctl(2), EPERM)
        await trio.lowlevel.checkpoint()
    try:
        return os.read(fd, READ_BYTES)
    except OSError:
        return b""  # the terminal was closed (EIO)


async def write_output(fd: int, data: bytes) -> None:
    """Writes all of it, also where somebody made the descriptor non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # somebody who shares the terminal made it non-blocking
            await trio.lowlevel.wait_writable(fd)


class _Attachment:
    def __init__(
        self,
        console: Console,
        nursery: trio.Nursery,
        *,
        ends_with_input: bool,
        until: Finder | None,
        output_fd: int,
        on_output: Callable[[bytes], object] | None,
    ) -> None:
        self._console = console
        self._ends_with_input = ends_with_input
        self._until = until
        self._output_fd = output_fd
        self._on_output = on_output
        self._scope = nursery.cancel_scope
        self._resized = trio.Event()
        self._has_written = console.is_writer
        self.ending = Ending.CONSOLE_ENDED
        console.on_writer = self._writer_changed
        if not console.is_writer:
            self._say_who_writes()

    def _end(self, ending: Ending) -> None:
        self.ending = ending
        self._scope.cancel()

    def _writer_changed(self) -> None:
        self._say_who_writes()
        self._has_written = self._console.is_writer
        self._resized.set()

    def _say_who_writes(self) -> None:
        if self._console.is_writer:
            text = "you write here now"
        elif self._console.writer is None:
            text = "nobody writes here now; Ctrl-T takes over"
        elif self._has_written:
            text = f"{self._console.writer} took over; you watch. Ctrl-T takes it back"
        else:
            text = f"{self._console.writer} writes here; you watch. Ctrl-T takes over"
        if os.isatty(2):
            os.write(2, f"\r\n[{text}]\r\n".encode())

    async def keys(self) -> None:
        is_terminal, has_read = os.isatty(0), False
        while data := await read_input(0):
            has_read = True
            typed, detach, _ = data.partition(DETACH) if is_terminal else (data, b"", b"")
            try:
                if self._console.is_writer:
                    if typed:
                        await self._console.write(typed)
                elif TAKE in typed:
                    await self._console.take()
            except GuestGone:
                return  # `output` sees the end, and its reason
            if detach:
                self._end(Ending.DETACHED)
                return
        if is_terminal or (has_read and self._ends_with_input):
            self._scope.deadline = trio.current_time() + LAST_WORDS_S
            self.ending = Ending.INPUT_ENDED

    async def output(self) -> None:
        while data := await self._console.read():
            await write_output(self._output_fd, data)
            if self._on_output is not None:
                self._on_output(data)
            if self._until is not None and self._until.feed(data) is not None:
                self._end(Ending.TEXT_SEEN)
                return
            if self.ending is Ending.INPUT_ENDED:
                self._scope.deadline = trio.current_time() + LAST_WORDS_S
        self._end(Ending.CONSOLE_ENDED)

    async def signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGWINCH) as changes:
            async for _ in changes:
                self._resized.set()

    async def size(self) -> None:
        """Told at first, when it changes, and when we become the writer."""
        if not os.isatty(1):
            return
        while True:
            size = os.get_terminal_size(1)
            try:
                await self._console.resize(max(1, size.columns), max(1, size.lines))
            except GuestGone:
                return
            await self._resized.wait()
            self._resized = trio.Event()


async def attach(
    console: Console,
    greeting: str,
    *,
    ends_with_input: bool = True,
    until: Finder | None = None,
    output_fd: int = 1,
    on_output: Callable[[bytes], object] | None = None,
) -> Ending:
    """This process's standard input and output are the console's, until the console ends or Ctrl-].

    Args:
        greeting: shown on a terminal once keys go to the guest.
        ends_with_input: the end of an input that is no terminal, and had something, is the end after the last words.
        until: ends as soon as the console's text has a match.
        output_fd: where the console's bytes go.
        on_output: is told of them too.

    Raises:
        Conflict: the input is no terminal, and somebody else writes there.
    """
    if not os.isatty(0) and not console.is_writer:
        raise Conflict(
            f"{console.writer} writes on this console", hint="--take takes over, --watch only watches"
        )
    with raw_terminal(0):
        if os.isatty(0) and os.isatty(2):
            os.write(2, f"{greeting}\r\n".encode())
        async with trio.open_nursery() as nursery:
            attachment = _Attachment(
                console,
                nursery,
                ends_with_input=ends_with_input,
                until=until,
                output_fd=output_fd,
                on_output=on_output,
            )
            for task in (attachment.keys, attachment.output, attachment.signals, attachment.size):
                nursery.start_soon(task)
    return attachment.ending


async def watch(console: Console) -> Ending:
    """Copies a console to standard output until it ends."""
    while data := await console.read():
        await write_output(1, data)
    return Ending.CONSOLE_ENDED

"""This terminal as the guest's: keys go in as they are, bytes come out as they are, Ctrl-] leaves.

Invariant: whatever happens, the terminal's settings are what they were before.
"""

from __future__ import annotations

import enum
import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from rayos_vmm.api.client import Console
from rayos_vmm.errors import GuestGone

DETACH: Final = b"\x1d"  # Ctrl-]
READ_BYTES: Final = 4096
# After the end of an input that is no terminal, what the guest still answers to it.
LAST_WORDS_S: Final = 0.5


class Ending(enum.Enum):
    """How the time at the console ended."""

    DETACHED = "detached"
    INPUT_ENDED = "input ended"
    CONSOLE_ENDED = "console ended"


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """The terminal without line editing, echo and signals; nothing is changed where `fd` is no terminal."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


async def _read(fd: int) -> bytes:
    try:
        await trio.lowlevel.wait_readable(fd)
    except PermissionError:  # a regular file: always readable (epoll_ctl(2), EPERM)
        await trio.lowlevel.checkpoint()
    try:
        return os.read(fd, READ_BYTES)
    except OSError:
        return b""  # the terminal was closed (EIO)


async def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # somebody who shares the terminal made it non-blocking
            await trio.lowlevel.wait_writable(fd)


class _Attachment:
    def __init__(self, console: Console, scope: trio.CancelScope) -> None:
        self._console = console
        self._scope = scope
        self.ending = Ending.CONSOLE_ENDED

    def _end(self, ending: Ending) -> None:
        self.ending = ending
        self._scope.cancel()

    async def keys(self) -> None:
        is_terminal = os.isatty(0)
        while data := await _read(0):
            typed, detach, _ = data.partition(DETACH) if is_terminal else (data, b"", b"")
            if typed:
                try:
                    await self._console.write(typed)
                except GuestGone:
                    return  # `output` sees the end, and its reason
            if detach:
                self._end(Ending.DETACHED)
                return
        self._scope.deadline = trio.current_time() + LAST_WORDS_S
        self.ending = Ending.INPUT_ENDED

    async def output(self) -> None:
        while data := await self._console.read():
            await _write(1, data)
            if self.ending is Ending.INPUT_ENDED:
                self._scope.deadline = trio.current_time() + LAST_WORDS_S
        self._end(Ending.CONSOLE_ENDED)

    async def size(self) -> None:
        if not os.isatty(1):
            return
        with trio.open_signal_receiver(signal.SIGWINCH) as changes:
            while True:
                size = os.get_terminal_size(1)
                try:
                    await self._console.resize(max(1, size.columns), max(1, size.lines))
                except GuestGone:
                    return
                await anext(changes)


async def attach(console: Console, greeting: str) -> Ending:
    """This process's standard input and output are the console's, until one of them ends or Ctrl-].

    `greeting` is shown on a terminal once keys go to the guest.
    """
    with raw_terminal(0):
        if os.isatty(0) and os.isatty(2):
            os.write(2, f"{greeting}\r\n".encode())
        async with trio.open_nursery() as nursery:
            attachment = _Attachment(console, nursery.cancel_scope)
            nursery.start_soon(attachment.keys)
            nursery.start_soon(attachment.output)
            nursery.start_soon(attachment.size)
    return attachment.ending

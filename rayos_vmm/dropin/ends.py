"""The outside ends of channels: standard input and output, files, sockets, pseudo-terminals."""

from __future__ import annotations

import os
import socket
import sys
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final, Protocol

import trio

from rayos_vmm.cli.terminal import read_input, write_output
from rayos_vmm.dropin.channel import Channel
from rayos_vmm.dropin.monitor import remove_socket
from rayos_vmm.errors import Invalid

READ_BYTES: Final = 4096


class End(Protocol):
    """Somebody at the other side: empty bytes when he is gone, which is not the end of the machine."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...


class Standard:
    """This process's standard input and output."""

    async def read(self) -> bytes:
        return await read_input(0)

    async def write(self, data: bytes) -> None:
        with suppress(BrokenPipeError):  # QEMU goes on when nobody reads
            await write_output(1, data)


class File:
    """A file that is written to."""

    def __init__(self, channel: Channel) -> None:
        try:
            flags = (
                os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if channel.is_appended else os.O_TRUNC)
            )
            self._fd = os.open(channel.path, flags, 0o666)
        except OSError as error:
            raise Invalid(f"{channel}: Unable to open {channel.path}: {error.strerror}") from None

    async def read(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return b""

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        with suppress(OSError):  # a full disk costs the log, not the guest
            os.write(self._fd, data)


class Pty:
    """A pseudo-terminal, whose name is told on standard output."""

    def __init__(self, label: str) -> None:
        self._fd, follower = os.openpty()
        self._follower = follower  # held, or the leader reads an error while nobody has it open
        tty.setraw(follower)
        os.set_blocking(self._fd, False)
        print(f"char device redirected to {os.ttyname(follower)} (label {label})", flush=True)

    async def read(self) -> bytes:
        await trio.lowlevel.wait_readable(self._fd)
        try:
            return os.read(self._fd, READ_BYTES)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        with suppress(OSError):  # nobody reads and it is full
            os.write(self._fd, data)


class Peer:
    """The other end of a socket; of a server the client that is there now, of which there is one at a time."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def read(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def write(self, data: bytes) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_all(data)


def listen(channel: Channel) -> trio.SocketListener:
    """A server's socket.

    Raises:
        Invalid: the address is taken, or is none.
    """
    try:
        if channel.kind == "unix":
            remove_socket(channel.path)
            inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            inner.bind(channel.path)
        else:
            inner = socket.create_server((channel.host, channel.port))
        inner.listen(4)
    except OSError as error:
        raise Invalid(f"{channel}: {error.strerror}") from None
    return trio.SocketListener(trio.socket.from_stdlib_socket(inner))


@asynccontextmanager
async def connect(channel: Channel) -> AsyncIterator[Peer]:
    """The peer of a client's socket.

    Raises:
        Invalid: nobody listens there.
    """
    try:
        if channel.kind == "unix":
            stream = await trio.open_unix_socket(channel.path)
        else:
            stream = await trio.open_tcp_stream(channel.host, channel.port)
    except OSError as error:
        raise Invalid(f"{channel}: {error.strerror or error}") from None
    async with stream:
        yield Peer(stream)


@contextmanager
def raw_input(*, has_signals: bool) -> Iterator[None]:
    """The terminal without line editing and echo; with `has_signals` Ctrl-C is still this process's."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)
        mode = termios.tcgetattr(0)
        mode[1] |= termios.OPOST
        if has_signals:
            mode[3] |= termios.ISIG
        termios.tcsetattr(0, termios.TCSADRAIN, mode)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)

"""Tells a guest to look at its display's mode again, through QEMU's D-Bus display.

Our GPU answers what the mode is, but only QEMU can raise VIRTIO_GPU_EVENT_DISPLAY (VIRTIO 1.3, 5.7.5): it keeps
`events_read` itself and refuses a vhost-user-gpu backend's CONFIG_CHANGE. It raises it when a viewer asks for a size,
and the one viewer that it accepts beside a vhost-user GPU without OpenGL is D-Bus, peer to peer (VNC is refused:
"requires display DMABUF support"). So we are that viewer for as long as one call takes: `SetUIInfo` (QEMU,
docs/interop/dbus-display). The bytes are the D-Bus Specification's, *Authentication Protocol* and *Message Protocol*.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import trio

from rayos_vmm.errors import GuestGone, RayosError
from rayos_vmm.qemu.qmp import Qmp, QmpRefused

TIMEOUT_S: Final = 10.0
_PROTOCOL: Final = "@dbus-display"
_INTERFACE: Final = "org.qemu.Display1.Console"
_LITTLE_ENDIAN, _CALL, _RETURN, _VERSION = 0x6C, 1, 2, 1
_PATH, _INTERFACE_FIELD, _MEMBER, _SIGNATURE = 1, 2, 3, 8
#: Byte order, type, flags, version; body bytes, serial, bytes of the header fields.
_HEADER: Final = struct.Struct("<BBBBIII")
#: millimetres, offset and size of the window.
_UI_INFO: Final = struct.Struct("<HHiiII")
_MAX_MESSAGE_BYTES: Final = 64 << 10


class NoDisplayEvents(RayosError):
    """This machine's QEMU has no D-Bus display, so a running guest cannot be told."""

    code = "no_display_events"
    status = 409


def set_ui_info(console: int, width: int, height: int, *, serial: int = 1) -> bytes:
    """The call's message: console number, size in pixels."""
    body = _UI_INFO.pack(0, 0, 0, 0, width, height)
    path = f"/org/qemu/Display1/Console_{console}"
    fields = b""
    for code, kind, text in (
        (_PATH, "o", path),
        (_INTERFACE_FIELD, "s", _INTERFACE),
        (_MEMBER, "s", "SetUIInfo"),
    ):
        fields = _pad(fields) + bytes((code, 1)) + kind.encode() + b"\0"
        fields += struct.pack("<I", len(text)) + text.encode() + b"\0"
    fields = _pad(fields) + bytes((_SIGNATURE, 1)) + b"g\0" + b"\x06qqiiuu\0"
    return (
        _pad(_HEADER.pack(_LITTLE_ENDIAN, _CALL, 0, _VERSION, len(body), serial, len(fields)) + fields) + body
    )


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


class DisplayEvents:
    """A viewer of QEMU's displays."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock

    async def announce_size(self, console: int, width: int, height: int) -> None:
        """Have QEMU tell the guest that a display of it (by its console's number) wants another size.

        Raises:
            GuestGone: QEMU went away, or did not answer within TIMEOUT_S.
        """
        with _bounded():
            await self._sock.send(set_ui_info(console, width, height))
            await _returned(self._sock)


@asynccontextmanager
async def open_display_events(qmp: Qmp) -> AsyncIterator[DisplayEvents]:
    """Become a viewer, until left.

    Raises:
        NoDisplayEvents: this QEMU has no such display.
        GuestGone: QEMU went away, or did not answer within TIMEOUT_S.
    """
    ours, theirs = trio.socket.socketpair(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    with ours:
        with theirs:
            try:
                await qmp.hand_over(theirs.fileno(), "rayos-display")
                await qmp.execute("add_client", {"protocol": _PROTOCOL, "fdname": "rayos-display"})
            except QmpRefused as error:
                raise NoDisplayEvents(
                    f"this QEMU has no D-Bus display, by which a guest is told of a new mode: {error.message}",
                    hint="give the mode in the machine's [gpu] table and start it again",
                ) from None
        with _bounded():
            await _authenticate(ours)
        yield DisplayEvents(ours)


@contextmanager
def _bounded() -> Iterator[None]:
    try:
        with trio.fail_after(TIMEOUT_S):
            yield
    except trio.TooSlowError:
        raise GuestGone(f"QEMU's D-Bus display did not answer within {TIMEOUT_S:g} s") from None
    except OSError as error:
        raise GuestGone(f"QEMU's D-Bus display went away: {error}") from None


async def _authenticate(sock: trio.socket.SocketType) -> None:
    """EXTERNAL: the kernel says who we are, beside the first byte."""
    credentials = struct.pack("3i", os.getpid(), os.getuid(), os.getgid())
    await sock.sendmsg([b"\0"], [(trio.socket.SOL_SOCKET, trio.socket.SCM_CREDENTIALS, credentials)])
    await sock.send(b"AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
    line = b""
    while not line.endswith(b"\r\n") and len(line) < 1024:
        piece = await sock.recv(1024)
        if not piece:
            raise ConnectionResetError("it hung up during the authentication")
        line += piece
    if not line.startswith(b"OK "):
        raise ConnectionRefusedError(f"it answered {line[:80]!r}")
    await sock.send(b"BEGIN\r\n")


async def _returned(sock: trio.socket.SocketType) -> None:
    """Until the call's answer is there; signals and QEMU's own calls are passed over."""
    while True:
        head = await _receive(sock, _HEADER.size)
        order, kind, _, _, body_bytes, _, fields_bytes = _HEADER.unpack(head)
        rest = -(-(_HEADER.size + fields_bytes) // 8) * 8 - _HEADER.size + body_bytes
        if order != _LITTLE_ENDIAN or rest > _MAX_MESSAGE_BYTES:
            raise ConnectionAbortedError(f"no D-Bus message: {head!r}")
        said = await _receive(sock, rest)
        if kind == _RETURN:
            return
        if kind > _RETURN and kind != 4:  # an error; 4 is a signal
            raise ConnectionAbortedError(f"it refused: {said[-body_bytes:]!r}")


async def _receive(sock: trio.socket.SocketType, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await sock.recv(size - len(data))
        if not piece:
            raise ConnectionResetError("it hung up")
        data += piece
    return data

"""Where frames come from and go to.

A port carries a virtio-net header before every frame, as a tap with IFF_VNET_HDR does, so that checksums and 64 KiB
segments pass through without being touched.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections import deque
from contextlib import suppress
from typing import Final, Protocol

from devices.net.wire import HEADER_BYTES, MAX_FRAME_BYTES

# linux/if_tun.h
TUNSETIFF: Final = 0x400454CA
TUNSETVNETHDRSZ: Final = 0x400454D8
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
TUNSETOFFLOAD: Final = 0x400454D0
TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04


class FramePort(Protocol):
    """One attachment to a network. `receive` and `send` never block."""

    def fileno(self) -> int:
        """Readable when a frame waits."""
        ...

    def receive(self, buffers: list[memoryview]) -> int:
        """One frame with its header into the buffers; its bytes. Errors: BlockingIOError when there is none."""
        ...

    def send(self, buffers: list[memoryview]) -> None:
        """One frame with its header. Errors: OSError when it cannot be taken (down, malformed): it is dropped."""
        ...

    def set_offload(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        """What `receive` may deliver: partial checksums, TCP segments up to 64 KiB."""
        ...

    def close(self) -> None: ...


class TapPort:
    """A tap's descriptor (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, header size 12), which becomes the port's own."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def receive(self, buffers: list[memoryview]) -> int:
        return os.readv(self._fd, buffers)

    def send(self, buffers: list[memoryview]) -> None:
        os.writev(self._fd, buffers)

    def set_offload(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        flags = (TUN_F_CSUM if csum else 0) | (TUN_F_TSO4 if tso4 else 0) | (TUN_F_TSO6 if tso6 else 0)
        fcntl.ioctl(self._fd, TUNSETOFFLOAD, flags)

    def close(self) -> None:
        os.close(self._fd)


def open_tap(name: str) -> int:
    """Attach to the tap `name`, or create it for as long as the descriptor is open. Errors: OSError (EBUSY, EPERM)."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
    except OSError:
        os.close(fd)
        raise
    return fd


class SinkPort:
    """Takes every frame and delivers none."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def receive(self, buffers: list[memoryview]) -> int:
        raise BlockingIOError

    def send(self, buffers: list[memoryview]) -> None:
        pass

    def set_offload(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        pass

    def close(self) -> None:
        os.close(self._fd)


class EchoPort(SinkPort):
    """Sends every frame back with its Ethernet addresses swapped; holds at most `LIMIT`, then drops the oldest."""

    LIMIT: Final = 1024

    def __init__(self) -> None:
        super().__init__()
        self._frames: deque[bytes] = deque(maxlen=self.LIMIT)

    def receive(self, buffers: list[memoryview]) -> int:
        if not self._frames:
            # Level-triggered: the counter stays up exactly as long as frames wait.
            with suppress(BlockingIOError):
                os.eventfd_read(self._fd)
            raise BlockingIOError
        frame = self._frames.popleft()
        done = 0
        for buffer in buffers:
            piece = frame[done : done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def send(self, buffers: list[memoryview]) -> None:
        frame = b"".join(buffers)
        addresses = frame[HEADER_BYTES : HEADER_BYTES + 12]
        swapped = frame[:HEADER_BYTES] + addresses[6:] + addresses[:6] + frame[HEADER_BYTES + 12 :]
        self._frames.append(swapped[: HEADER_BYTES + MAX_FRAME_BYTES])
        os.eventfd_write(self._fd, 1)

"""Where frames come from and go to.

A port carries a virtio-net header before every frame, as a tap with IFF_VNET_HDR does, so that checksums and 64 KiB
segments pass through without being touched.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from typing import Final, Protocol, cast, runtime_checkable

from rayos_devices.net.path import FilePath, Frames, Path, QueuePath, ViewPath
from rayos_devices.net.queue import FrameQueue
from rayos_devices.net.wire import HEADER_BYTES

# linux/if_tun.h
TUNSETIFF: Final = 0x400454CA
TUNSETVNETHDRSZ: Final = 0x400454D8
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETQUEUE: Final = 0x400454D9
IFF_MULTI_QUEUE: Final = 0x0100
IFF_ATTACH_QUEUE: Final = 0x0200
IFF_DETACH_QUEUE: Final = 0x0400
TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
_IFREQ: Final = struct.Struct("16sH22x")


class NetPort(Protocol):
    """One attachment to a network for a pair of queues: a PathPort or a FramePort."""

    def fileno(self) -> int:
        """Readable when a frame waits."""
        ...

    def set_offload(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        """Sets the offloads that may be delivered: partial checksums, TCP segments up to 64 KiB."""
        ...

    def set_enabled(self, enabled: bool) -> None:
        """Whether the pair's queues are served: the network picks among the ports of a device that are."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class PathPort(NetPort, Protocol):
    """A port that the compiled rings reach by themselves."""

    def path(self) -> Path:
        """Asked for once."""
        ...


class FramePort(NetPort, Frames, Protocol):
    """A port that the rings reach by views of their memory."""


class TapPort:
    """A tap's descriptor (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, header size 12), which becomes the port's own.

    `is_further`: a further queue of a tap with several (IFF_MULTI_QUEUE). The kernel sends a flow to the queue that
    it last came from, so one that is not served has to be detached, and starts so.
    """

    def __init__(self, fd: int, *, is_further: bool = False) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._is_further = is_further

    def path(self) -> Path:
        return FilePath(self._fd)

    def fileno(self) -> int:
        return self._fd

    def set_offload(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        flags = (TUN_F_CSUM if csum else 0) | (TUN_F_TSO4 if tso4 else 0) | (TUN_F_TSO6 if tso6 else 0)
        fcntl.ioctl(self._fd, TUNSETOFFLOAD, flags)

    def set_enabled(self, enabled: bool) -> None:
        if self._is_further:
            # EINVAL: it is so already, by a predecessor of this process.
            try:
                _set_queue(self._fd, IFF_ATTACH_QUEUE if enabled else IFF_DETACH_QUEUE)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise

    def close(self) -> None:
        os.close(self._fd)


def open_tap(name: str, queues: int = 1) -> list[int]:
    """Attach to the tap `name`, or create it for as long as a descriptor is open: one for each queue, those after the
    first detached. Errors: OSError (EBUSY, EPERM)."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
    fds: list[int] = []
    try:
        for index in range(queues):
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
            fcntl.ioctl(fds[-1], TUNSETIFF, _IFREQ.pack(name.encode(), flags))
            fcntl.ioctl(fds[-1], TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
            if index:
                _set_queue(fds[-1], IFF_DETACH_QUEUE)
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _set_queue(fd: int, flag: int) -> None:
    fcntl.ioctl(fd, TUNSETQUEUE, _IFREQ.pack(b"", flag))


def tap_ports(fds: Sequence[int]) -> list[TapPort]:
    """A tap's ports, from `open_tap`'s descriptors."""
    return [TapPort(fd, is_further=index > 0) for index, fd in enumerate(fds)]


class SinkPort:
    """Takes every frame and delivers none."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def path(self) -> Path:
        return Path()

    def fileno(self) -> int:
        return self._fd

    def receive(self, buffers: list[memoryview]) -> int:
        raise BlockingIOError

    def send(self, buffers: list[memoryview]) -> None:
        pass

    def set_offload(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        pass

    def set_enabled(self, enabled: bool) -> None:
        pass

    def close(self) -> None:
        os.close(self._fd)


class QueuePort:
    """One end of a cable inside this process. A frame arrives as it was sent, also one of 64 KiB with a partial
    checksum: both drivers must have acked the same offloads."""

    def __init__(self, outgoing: FrameQueue, incoming: FrameQueue) -> None:
        self._outgoing = outgoing
        self._incoming = incoming

    def path(self) -> Path:
        return QueuePath(self._outgoing, self._incoming)

    def fileno(self) -> int:
        return self._incoming.fd

    def set_offload(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        pass

    def set_enabled(self, enabled: bool) -> None:
        pass

    def close(self) -> None:
        self._incoming.close()


def join_ports() -> tuple[QueuePort, QueuePort]:
    """Two ports, each other's network, without a tap: for two network devices of one process."""
    one, other = FrameQueue(), FrameQueue()
    return QueuePort(one, other), QueuePort(other, one)


class EchoPort(QueuePort):
    """Sends every frame back with its Ethernet addresses swapped."""

    def __init__(self) -> None:
        both = FrameQueue(is_echo=True)
        super().__init__(both, both)


def path_of(port: NetPort) -> Path:
    """The port's own path; a class of its own `send` and `receive` has none and is asked by those."""
    is_direct = "send" not in vars(type(port)) or "path" in vars(type(port))
    return port.path() if is_direct and isinstance(port, PathPort) else ViewPath(cast("FramePort", port))

"""A tap device by ioctl (pyroute2 has no call for these): Documentation/networking/tuntap.rst,
linux/if_tun.h.

Invariant: a tap made here is new (``IFF_TUN_EXCL``), lives exactly as long as its descriptor, carries a
virtio-net header of 12 bytes before every frame when asked for one, and never hands back a descriptor to
somebody else's device.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
TUNSETQUEUE: Final = 0x400454D9

IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_MULTI_QUEUE: Final = 0x0100
IFF_DETACH_QUEUE: Final = 0x0400
IFF_VNET_HDR: Final = 0x4000
IFF_TUN_EXCL: Final = 0x8000

VNET_HEADER_SIZE: Final = 12  # struct virtio_net_hdr_v1 with num_buffers (VIRTIO 1.3, 5.1.6)

_IFREQ: Final = struct.Struct("16sH22x")  # struct ifreq: name, flags, padding to 40 bytes


class TapBusy(OSError):
    """A device of that name exists already; `strerror` is the kernel's word for it."""


def create(name: str, *, vnet_hdr: bool = True, multi_queue: bool = False) -> int:
    """Make the tap `name` and return its descriptor (non-blocking, close-on-exec). Closing it, and those of
    `add_queue`, removes the device.

    Raises TapBusy when a device of that name exists, OSError for everything else (EPERM without
    CAP_NET_ADMIN).
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _attach(fd, name, IFF_TUN_EXCL | (IFF_MULTI_QUEUE if multi_queue else 0), vnet_hdr)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EBUSY, errno.EINVAL, errno.EEXIST):
            raise TapBusy(error.errno, error.strerror) from error
        raise
    except BaseException:
        os.close(fd)
        raise
    return fd


def add_queue(name: str, *, vnet_hdr: bool = True) -> int:
    """A further queue of the tap `name`, made with `multi_queue`: detached, so that no frame goes to it yet.

    Raises OSError.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _attach(fd, name, IFF_MULTI_QUEUE, vnet_hdr)
        fcntl.ioctl(fd, TUNSETQUEUE, _IFREQ.pack(b"", IFF_DETACH_QUEUE))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _attach(fd: int, name: str, flags: int, vnet_hdr: bool) -> None:
    flags |= IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet_hdr else 0)
    fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode(), flags))
    if vnet_hdr:
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_SIZE))


def set_offload(fd: int, flags: int) -> None:
    """Say which offloads (TUN_F_* bits) frames written to the guest may use. Raises OSError when the kernel
    refuses.
    """
    fcntl.ioctl(fd, TUNSETOFFLOAD, flags)


def holders(name: str) -> list[tuple[int, str]]:
    """The processes that hold the tap `name` open, as (pid, command name), as far as /proc lets us see them."""
    needle = f"iff:\t{name}\n"
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(needle in _tun_info(info) for info in (process / "fd").iterdir()):
                found.append((int(process.name), (process / "comm").read_text().strip()))
        except OSError:
            continue  # gone meanwhile, or not ours to look at
    return sorted(found)


def _tun_info(descriptor: Path) -> str:
    try:
        if str(descriptor.readlink()) != "/dev/net/tun":
            return ""
        return (descriptor.parents[1] / "fdinfo" / descriptor.name).read_text()
    except OSError:
        return ""

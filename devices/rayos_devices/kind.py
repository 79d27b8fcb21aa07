"""The record of a device kind: all that others must know of it before, beside and around its backend.

`rayos_devices.kinds` lists them; each stands in its device's folder as `kind.py`. A worker, its keeper, `serve`, the
accounts, the command line of QEMU and our own read the record, so that a new device is a new folder and a line there.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from rayos_devices.backend import Backend
from rayos_devices.gate import OPEN, Gate
from rayos_devices.host import HostOperation
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.state import StateStore


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """The settings of one device; each kind reads those that it has. `name` is unique in the VM.

    `fd` is a disk's image, `queue_fds` are a tap's queues, one for each pair of the device's. `quota_bytes` bounds a
    disk's storage or a GPU's memory, `rate_bytes_per_second` what is moved: by a network card in each direction, by a
    disk together. A disk has `size_bytes` where that is more than the image's, a logical block that its driver is told,
    and if it `is_unsafe` flushes that stay in the page cache. Sizes of pictures are in pixels; `modes` are offered
    beside the first. Port 0 is the console.

    `front` is who connects: a vhost-user frontend, or QEMU's block layer by NBD (blk) or its `-netdev stream` of `mtu`
    (net), or, to a `chardev`, QEMU's own console.
    """

    name: str
    fd: int = -1
    queue_fds: tuple[int, ...] = ()
    read_only: bool = False
    serial: str = ""
    queues: int = 1
    size_bytes: int = 0
    block_bytes: int = 512
    is_unsafe: bool = False
    front: Literal["vhost-user", "nbd", "stream"] = "vhost-user"
    mtu: int = 1500
    chardev: bool = False
    quota_bytes: int | None = None
    rate_bytes_per_second: float | None = None
    operations_per_second: float | None = None
    input_kind: Literal["keyboard", "mouse", "tablet", "touch"] = "keyboard"
    queue_limit: int = 64
    width: int = 1280
    height: int = 800
    modes: tuple[tuple[int, int], ...] = ()
    scanouts: int = 1
    ports: tuple[str, ...] = ("",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """The parts that a backend is built into. `state` and `bulk_fd` outlive the worker; `judge` decides on frames."""

    loop: Loop
    gate: Gate = OPEN
    state: StateStore | None = None
    bulk_fd: int = -1
    judge: Any = None


class Front(Protocol):
    """Whoever serves a backend on a socket."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class QemuDevice:
    """The words by which QEMU is told of a device: `-device TYPE,chardev=NAME,PROPERTIES`.

    Attributes:
        properties: with fields in braces, which the service fills in for one machine.
        netdev: QEMU's own device stands before a `-netdev vhost-user` of that name, with these properties.
    """

    type: str
    properties: str = ""
    netdev: str = ""
    netdev_properties: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """A kind of device.

    Attributes:
        name: in the folder's words, such as "blk"; `summary` is for people.
        virtio_id: VIRTIO 1.3, 5.
        limits: that can be changed while it runs (`Backend.apply_limit` applies each).
        queue_count: virtqueues, which a keeper must know before there is a backend.
        state_bytes: of the state store that outlives a worker; 0 for none.
        bulk: a word for the other memory that outlives a worker, and its bytes; 0 for none.
        build: the backend, in the state that its predecessor left.
        qemu: the words for QEMU.
        accept: serves others than vhost-user frontends on listening sockets, for a guest without our driver.
        front_bytes: of memory that this takes.
        operations: of the host's side on the device, by name.
        add_serve_options, serve: `rayos device serve NAME`: its options, and each backend with the socket's path.
    """

    name: str
    summary: str
    virtio_id: int
    limits: tuple[Limit, ...]
    build: Callable[[DeviceOptions, Surroundings], Backend]
    qemu: QemuDevice
    add_serve_options: Callable[[argparse.ArgumentParser], None]
    serve: Callable[[argparse.Namespace, Loop], list[tuple[Path, Backend]]]
    queue_count: Callable[[DeviceOptions], int] = lambda options: 2
    state_bytes: int = 0
    bulk: Callable[[DeviceOptions], tuple[str, int]] = lambda options: ("", 0)
    accept: Callable[[Backend, DeviceOptions, Sequence[socket.socket], Loop], list[Front]] | None = None
    front_bytes: Callable[[DeviceOptions], int] = lambda options: 0
    operations: Mapping[str, HostOperation[Any]] = field(default_factory=dict)


def add_queues(parser: argparse.ArgumentParser, meaning: str = "") -> None:
    """Adds the option for how many queues a device has."""
    parser.add_argument(
        "--queues", type=int, choices=range(1, 17), default=1, metavar="1..16", help=meaning or None
    )


def add_poll_us(parser: argparse.ArgumentParser) -> None:
    """Adds the option for how long an idle device looks for work."""
    parser.add_argument(
        "--poll-us", type=float, default=0.0, help="look for work so long before sleeping; default 0"
    )

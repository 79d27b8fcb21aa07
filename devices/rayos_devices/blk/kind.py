"""virtio-blk's record."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.blk.backend import BlkBackend
from rayos_devices.blk.nbd import MEMORY_BYTES, NbdPort
from rayos_devices.blk.operations import OPERATIONS
from rayos_devices.blk.store import RawStore
from rayos_devices.errors import ConfigurationError
from rayos_devices.kind import (
    DeviceKind,
    DeviceOptions,
    Front,
    QemuDevice,
    Surroundings,
    add_poll_us,
    add_queues,
)
from rayos_devices.loop import Loop


def _build(options: DeviceOptions, around: Surroundings) -> Backend:
    backend = BlkBackend(
        options.name,
        around.loop,
        RawStore(
            options.fd,
            read_only=options.read_only,
            size_bytes=options.size_bytes,
            is_unsafe=options.is_unsafe,
        ),
        serial=options.serial,
        queues=options.queues,
        quota_bytes=options.quota_bytes,
        block_bytes=options.block_bytes,
        gate=around.gate,
    )
    backend.set_limits(
        operations_per_second=options.operations_per_second or 0.0,
        bytes_per_second=options.rate_bytes_per_second or 0.0,
    )
    return backend


def _accept(
    backend: Backend, _options: DeviceOptions, listening: Sequence[socket.socket], loop: Loop
) -> list[Front]:
    if not isinstance(backend, BlkBackend):
        raise ConfigurationError(f"{backend.name} is no disk")
    return [NbdPort(backend, sock, loop) for sock in listening]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, required=True, help="raw file or block device")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--nbd", dest="accepts", action="store_true", help="speak NBD, not vhost-user")
    parser.add_argument("--direct", action="store_true", help="past the page cache (O_DIRECT)")
    parser.add_argument("--serial", default="", help="up to 20 bytes")
    add_queues(parser)
    add_poll_us(parser)


def _serve(arguments: argparse.Namespace, loop: Loop) -> list[tuple[Path, Backend]]:
    mode = os.O_RDONLY if arguments.read_only else os.O_RDWR
    image = os.open(arguments.image, mode | os.O_CLOEXEC)
    store = RawStore(image, read_only=arguments.read_only, is_direct=arguments.direct)
    poll_ns = int(arguments.poll_us * 1000)
    backend = BlkBackend(
        "blk", loop, store, serial=arguments.serial, queues=arguments.queues, poll_ns=poll_ns
    )
    return [(arguments.socket, backend)]


BLK: Final = DeviceKind(
    name="blk",
    summary="a disk, from a raw image or a block device",
    virtio_id=BlkBackend.device_id,
    limits=BlkBackend.LIMITS,
    queue_count=lambda options: options.queues,
    build=_build,
    qemu=QemuDevice("vhost-user-blk-pci", "num-queues={queues},bootindex={bootindex}"),
    add_serve_options=_add_options,
    serve=_serve,
    operations=OPERATIONS,
    accept=_accept,
    front_bytes=lambda options: MEMORY_BYTES if options.front == "nbd" else 0,
)

"""virtio-net's record. To QEMU the card is its own, before a network device that is ours."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rayos_devices.backend import Backend
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
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.operations import OPERATIONS
from rayos_devices.net.port import EchoPort, NetPort, SinkPort, join_ports, open_tap, tap_ports
from rayos_devices.net.stream import StreamPort, memory_bytes


def _build(options: DeviceOptions, around: Surroundings) -> Backend:
    return NetBackend(
        options.name,
        around.loop,
        *tap_ports(options.queue_fds),
        rate_bytes_per_second=options.rate_bytes_per_second,
        gate=around.gate,
        judge=around.judge,
    )


def _accept(
    backend: Backend, options: DeviceOptions, listening: Sequence[socket.socket], loop: Loop
) -> list[Front]:
    if not isinstance(backend, NetBackend):
        raise ConfigurationError(f"{backend.name} is no network card")
    return [StreamPort(backend, sock, loop, mtu=options.mtu) for sock in listening]


def _add_options(parser: argparse.ArgumentParser) -> None:
    port = parser.add_mutually_exclusive_group(required=True)
    port.add_argument("--tap", help="name of the tap to create or attach to")
    parser.add_argument(
        "--stream", dest="accepts", action="store_true", help="speak QEMU's -netdev stream, not vhost-user"
    )
    port.add_argument("--echo", action="store_true", help="send every frame back")
    port.add_argument("--sink", action="store_true", help="take every frame")
    port.add_argument("--join", type=Path, help="socket of a second device: each other's network")
    add_queues(parser, "pairs")
    parser.add_argument("--rate", type=float, help="bytes a second, each direction; default unbounded")
    add_poll_us(parser)


def _serve(arguments: argparse.Namespace, loop: Loop) -> list[tuple[Path, Backend]]:
    loop.set_polling(arguments.poll_us * 1e-6)
    if arguments.join:
        cables = [join_ports() for _ in range(arguments.queues)]
        return [
            (path, NetBackend(f"net{end}", loop, *ports, rate_bytes_per_second=arguments.rate))
            for end, (path, ports) in enumerate(
                zip((arguments.socket, arguments.join), zip(*cables, strict=True), strict=True)
            )
        ]
    backend = NetBackend("net", loop, *_ports(arguments), rate_bytes_per_second=arguments.rate)
    return [(arguments.socket, backend)]


def _ports(arguments: argparse.Namespace) -> Sequence[NetPort]:
    if arguments.tap:
        return tap_ports(open_tap(arguments.tap, arguments.queues))
    return [EchoPort() if arguments.echo else SinkPort() for _ in range(arguments.queues)]


NET: Final = DeviceKind(
    name="net",
    summary="a network card, on a tap, on another card, or on nothing",
    virtio_id=NetBackend.device_id,
    limits=NetBackend.LIMITS,
    queue_count=lambda options: 2 * len(options.queue_fds),
    build=_build,
    qemu=QemuDevice(
        "virtio-net-pci",
        "mac={mac},host_mtu={mtu},romfile={multiqueue}",
        netdev="nic0",
        netdev_properties="queues={queues}",
    ),
    add_serve_options=_add_options,
    serve=_serve,
    operations=OPERATIONS,
    accept=_accept,
    front_bytes=lambda options: memory_bytes(options.mtu) if options.front == "stream" else 0,
)

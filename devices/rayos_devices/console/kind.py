"""virtio-console's record. QEMU has no device type of its own for it, but one for any virtio id."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.console.backend import ConsoleBackend
from rayos_devices.console.chardev import serve_chardevs
from rayos_devices.console.operations import OPERATIONS
from rayos_devices.console.port import PortSpec
from rayos_devices.console.wire import CONFIG, queue_count
from rayos_devices.errors import ConfigurationError
from rayos_devices.kind import DeviceKind, DeviceOptions, Front, QemuDevice, Surroundings
from rayos_devices.loop import Loop
from rayos_devices.standard_io import join_terminal


def _build(options: DeviceOptions, around: Surroundings) -> Backend:
    return ConsoleBackend(
        options.name,
        around.loop,
        ports=[PortSpec(name, is_console=index == 0) for index, name in enumerate(options.ports)],
        state=around.state,
        history_fd=around.bulk_fd,
        gate=around.gate,
    )


def _accept(
    backend: Backend, _options: DeviceOptions, listening: Sequence[socket.socket], loop: Loop
) -> list[Front]:
    if not isinstance(backend, ConsoleBackend):
        raise ConfigurationError(f"{backend.name} has no ports")
    return list(serve_chardevs(backend, listening, loop))


def _add_options(_parser: argparse.ArgumentParser) -> None:
    """None beside the socket."""


def _serve(arguments: argparse.Namespace, loop: Loop) -> list[tuple[Path, Backend]]:
    backend = ConsoleBackend("console", loop, ports=[PortSpec("console", is_console=True)])
    join_terminal(backend, loop)
    return [(arguments.socket, backend)]


CONSOLE: Final = DeviceKind(
    name="console",
    summary="a console and further ports",
    virtio_id=ConsoleBackend.device_id,
    limits=ConsoleBackend.LIMITS,
    queue_count=lambda options: queue_count(len(options.ports)),
    state_bytes=ConsoleBackend.STATE_BYTES,
    bulk=lambda options: ("history", ConsoleBackend.history_bytes(len(options.ports))),
    build=_build,
    qemu=QemuDevice(
        "vhost-user-test-device-pci",
        f"virtio-id={int(ConsoleBackend.device_id)},num_vqs={{num_vqs}},config_size={CONFIG.size}",
    ),
    add_serve_options=_add_options,
    serve=_serve,
    operations=OPERATIONS,
    accept=_accept,
)

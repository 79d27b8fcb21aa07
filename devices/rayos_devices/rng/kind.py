"""virtio-entropy's record."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.kind import DeviceKind, DeviceOptions, QemuDevice, Surroundings
from rayos_devices.loop import Loop
from rayos_devices.rng.backend import RngBackend


def _build(options: DeviceOptions, around: Surroundings) -> Backend:
    rate = options.rate_bytes_per_second
    return RngBackend(options.name, around.loop, rate_bytes_per_second=rate, gate=around.gate)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate", type=float, help="bytes a second; default unbounded")


def _serve(arguments: argparse.Namespace, loop: Loop) -> list[tuple[Path, Backend]]:
    return [(arguments.socket, RngBackend("rng", loop, rate_bytes_per_second=arguments.rate))]


RNG: Final = DeviceKind(
    name="rng",
    summary="random bytes of the host's kernel",
    virtio_id=RngBackend.device_id,
    limits=RngBackend.LIMITS,
    queue_count=lambda options: 1,
    build=_build,
    qemu=QemuDevice("vhost-user-rng-pci"),
    add_serve_options=_add_options,
    serve=_serve,
)

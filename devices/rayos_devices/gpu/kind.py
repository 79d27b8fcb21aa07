"""virtio-gpu's record."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.gpu.operations import OPERATIONS
from rayos_devices.kind import DeviceKind, DeviceOptions, QemuDevice, Surroundings
from rayos_devices.loop import Loop

DEFAULT_QUOTA_BYTES: Final = 128 << 20


def _quota(options: DeviceOptions) -> int:
    return options.quota_bytes or DEFAULT_QUOTA_BYTES


def _build(options: DeviceOptions, around: Surroundings) -> Backend:
    return GpuBackend(
        options.name,
        around.loop,
        width=options.width,
        height=options.height,
        modes=options.modes,
        scanouts=options.scanouts,
        quota_bytes=_quota(options),
        heap_fd=around.bulk_fd,
        state=around.state,
        gate=around.gate,
    )


def _mode(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mode: such as 1920x1080")
    return int(width), int(height)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", type=_mode, default=(1280, 800), metavar="WxH", help="such as 1920x1080")
    parser.add_argument("--scanouts", type=int, choices=range(1, 17), default=1, metavar="1..16")


def _serve(arguments: argparse.Namespace, loop: Loop) -> list[tuple[Path, Backend]]:
    width, height = arguments.mode
    backend = GpuBackend("gpu", loop, width=width, height=height, scanouts=arguments.scanouts)
    return [(arguments.socket, backend)]


GPU: Final = DeviceKind(
    name="gpu",
    summary="a display with up to 16 scanouts",
    virtio_id=GpuBackend.device_id,
    limits=GpuBackend.LIMITS,
    state_bytes=GpuBackend.STATE_BYTES,
    bulk=lambda options: ("pixels", _quota(options)),
    build=_build,
    # QEMU's wrapper alone offers RING_RESET by itself, and tells its backend nothing of a reset.
    qemu=QemuDevice("{gpu}", "queue_reset=off,max_outputs={scanouts},xres={width},yres={height}"),
    add_serve_options=_add_options,
    serve=_serve,
    operations=OPERATIONS,
)

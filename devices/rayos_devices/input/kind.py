"""virtio-input's record; which buttons and axes each of the four models has is in `model.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.input.backend import InputBackend
from rayos_devices.input.model import KINDS
from rayos_devices.input.operations import OPERATIONS
from rayos_devices.kind import DeviceKind, DeviceOptions, QemuDevice, Surroundings
from rayos_devices.loop import Loop
from rayos_devices.standard_io import join_events


def _build(options: DeviceOptions, around: Surroundings) -> Backend:
    return InputBackend(
        options.name,
        around.loop,
        options.input_kind,
        state=around.state,
        queue_limit=options.queue_limit,
        gate=around.gate,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", choices=tuple(KINDS), default="keyboard", help="events: JSON on standard input"
    )


def _serve(arguments: argparse.Namespace, loop: Loop) -> list[tuple[Path, Backend]]:
    backend = InputBackend("input", loop, arguments.kind)
    join_events(backend, loop)
    return [(arguments.socket, backend)]


INPUT: Final = DeviceKind(
    name="input",
    summary="a keyboard, mouse, tablet or touch screen",
    virtio_id=InputBackend.device_id,
    limits=InputBackend.LIMITS,
    state_bytes=InputBackend.STATE_BYTES,
    build=_build,
    qemu=QemuDevice("vhost-user-input-pci"),
    add_serve_options=_add_options,
    serve=_serve,
    operations=OPERATIONS,
)

"""The host's operations on a display."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.host import HostAnswer, HostOperation, HostRequest


def _info(backend: GpuBackend, request: HostRequest) -> HostAnswer:
    return {"serial": backend.damage_serial, "scanouts": backend.screen.snapshot()}, b"", []


def _frame(backend: GpuBackend, request: HostRequest) -> HostAnswer:
    head = request.fields
    frame = backend.frame(int(head["scanout"]), with_cursor=bool(head["cursor"]))
    fd = os.memfd_create("rayos-frame", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(frame.pixels)
    fields = {
        "width": frame.width,
        "height": frame.height,
        "stride": frame.stride,
        "serial": frame.serial,
    }
    return fields, b"", [fd]


def _resize(backend: GpuBackend, request: HostRequest) -> HostAnswer:
    head = request.fields
    is_done = backend.resize(int(head["scanout"]), int(head["width"]), int(head["height"]))
    return ({}, b"", []) if is_done else None


def _wait(backend: GpuBackend, request: HostRequest) -> HostAnswer:
    head = request.fields
    damage = backend.screen.damage_since(int(head["since"]), int(head["scanout"]))
    return ({"serial": damage.serial, "rect": damage.rect}, b"", []) if damage is not None else None


OPERATIONS: Final[Mapping[str, HostOperation[GpuBackend]]] = {
    "gpu.info": HostOperation(GpuBackend, _info, "gpu"),
    "gpu.frame": HostOperation(GpuBackend, _frame, "gpu"),
    "gpu.resize": HostOperation(GpuBackend, _resize, "gpu"),
    "gpu.wait": HostOperation(GpuBackend, _wait, "gpu"),
}

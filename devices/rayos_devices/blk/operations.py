"""The host's operations on a disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rayos_devices.blk.backend import BlkBackend
from rayos_devices.faults import plan_faults
from rayos_devices.host import HostAnswer, HostOperation, HostRequest


def _resize(backend: BlkBackend, _request: HostRequest) -> HostAnswer:
    return {"size_bytes": backend.resize()}, b"", []


def _faults(backend: BlkBackend, request: HostRequest) -> HostAnswer:
    """With `rules`: from now on these; without: what they did so far."""
    if "rules" in request.fields:
        backend.set_faults(plan_faults(backend.faults, request.fields))
    return {"rules": backend.faults.snapshot() if backend.faults else []}, b"", []


OPERATIONS: Final[Mapping[str, HostOperation[BlkBackend]]] = {
    "blk.resize": HostOperation(BlkBackend, _resize),
    "faults": HostOperation(BlkBackend, _faults),
}

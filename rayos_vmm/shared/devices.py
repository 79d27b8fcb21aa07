"""The devices of a machine by its specification: their names, their kinds, and which quotas bound them.

All else about a kind is in its record (`rayos_devices.kinds`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from rayos_devices.limits import Limit
from rayos_vmm.config.spec import Quota, VmSpec


@dataclass(frozen=True, slots=True)
class Bound:
    """Where the specification bounds what a limit does: the field of `Quota`, and its value in the limit's unit."""

    field: str
    read: Callable[[Quota], int]
    write: Callable[[int], str | int]


def _size(value: int) -> str:
    return f"{value}B"


#: By kind: the quota behind each limit that can be changed; None: nothing bounds it.
BOUNDS: Final[Mapping[str, Mapping[Limit, Bound | None]]] = {
    "net": {
        Limit.RATE: Bound(
            "net_rate", lambda quota: quota.net_rate_bits_per_second // 8, lambda v: f"{8 * v}bit/s"
        )
    },
    "blk": {
        Limit.RATE: Bound(
            "disk_rate", lambda quota: quota.disk_rate_bytes_per_second or 0, lambda v: f"{v}B/s"
        ),
        Limit.OPERATIONS: Bound("disk_operations", lambda quota: quota.disk_operations or 0, int),
        Limit.STORAGE: Bound("disk", lambda quota: quota.disk_bytes, _size),
    },
    "gpu": {Limit.MEMORY: Bound("gpu_memory", lambda quota: quota.gpu_memory_bytes, _size)},
    "input": {Limit.QUEUE: Bound("input_queue", lambda quota: quota.input_queue, int)},
    "console": {Limit.RATE: None},
    "rng": {
        Limit.RATE: Bound("rng_rate", lambda quota: quota.rng_rate_bytes_per_second, lambda v: f"{v}B/s")
    },
}


def devices_of(spec: VmSpec) -> dict[str, str]:
    """The kind of each device that a machine has while it runs, by the device's name, in the order on its bus."""
    kinds = {f"disk{index}": "blk" for index in range(len(spec.disks))}
    if spec.net.enabled:
        kinds["net"] = "net"
    if spec.gpu.is_ours:
        kinds["gpu"] = "gpu"
    if spec.gpu.enabled:
        kinds |= dict.fromkeys(spec.input.devices, "input")
    kinds["console"] = "console"
    return kinds | ({"rng": "rng"} if spec.rng else {})


def rate_of(spec: VmSpec, kind: str) -> float | None:
    """The bytes a second that the specification gives a device of a kind; None is unbounded."""
    bound = BOUNDS[kind].get(Limit.RATE)
    return None if bound is None else float(bound.read(spec.quota)) or None

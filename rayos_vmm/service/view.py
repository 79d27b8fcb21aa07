"""The service as callers see it."""

from __future__ import annotations

import msgspec

from rayos_vmm.qemu.platform import AcceleratorView, QemuView


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon: its QEMU, accelerator and network (None where there is none, and why), and where it keeps what."""

    version: str
    qemu: QemuView
    accelerator: AcceleratorView
    subnet: str | None
    bridge: str | None
    network_trouble: str
    uptime_s: float
    compiled: bool
    runtime: str
    state: str

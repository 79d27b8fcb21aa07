"""Every kind of device that can be served, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rayos_devices.blk.kind import BLK
from rayos_devices.console.kind import CONSOLE
from rayos_devices.gpu.kind import GPU
from rayos_devices.input.kind import INPUT
from rayos_devices.kind import DeviceKind
from rayos_devices.net.kind import NET
from rayos_devices.rng.kind import RNG

KINDS: Final[Mapping[str, DeviceKind]] = {kind.name: kind for kind in (BLK, NET, GPU, INPUT, CONSOLE, RNG)}

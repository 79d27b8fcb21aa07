"""One VM's accounts: a file in its run directory that its worker writes and anybody who may read it maps.

One account (`rayos_devices.account`) for each device in their order, then the worker's ring of metrics
(`rayos_devices.metrics`), its level of optimization, and what each layer of the firewall decided (LAYERS), a
second old at most. The keeper holds the descriptor for the workers; a worker maps it and lets go of it before it
serves, so that it cannot make the file shorter under its readers. What it writes there is a guest's word, no more.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rayos_devices.account import ACCOUNT_BYTES, Account
from rayos_devices.backend import Backend
from rayos_devices.levels import DEFAULT, Level
from rayos_devices.loop import Loop
from rayos_devices.metrics import METRICS_BYTES, MetricsRing, read_samples

FILE_NAME: Final = "accounts"
#: Seconds between two samples.
PERIOD: Final = 1.0
_JUDGED: Final = ("flow", "reply", "deny_list", "exact", "ranges", "default")
#: The layers of a firewall: the first that knows decides a frame. They are the device's `cache` of verdicts, the
#: judge's `flow` table, a `reply` to an allowed flow, then the compiled rules (`deny_list`, `exact`, `ranges`, else
#: `default`). `guard` is all else: frames that the spoof guard or the parser refused or let through, such as ARP.
LAYERS: Final = ("cache", *_JUDGED, "guard")
_LEVEL_BYTES: Final = 8
_LAYER_BYTES: Final = 8 * len(LAYERS)
#: What level 3 gives the loop to look for work, in seconds.
POLLING_SECONDS: Final = 50e-6


def file_bytes(devices: int) -> int:
    """The size of the file for so many devices."""
    return devices * ACCOUNT_BYTES + METRICS_BYTES + _LEVEL_BYTES + _LAYER_BYTES


def create(run_dir: Path, devices: int) -> int:
    """A descriptor of a fresh file, for reading and writing. Errors: OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(run_dir / FILE_NAME, flags, 0o600)
    os.ftruncate(fd, file_bytes(devices))
    return fd


def _level(word: memoryview) -> int:
    value: int = word[0]
    return value - 1 if 0 < value <= len(Level) else DEFAULT


def _tail(page: memoryview) -> tuple[memoryview, memoryview]:
    return page[:_LEVEL_BYTES].cast("Q"), page[_LEVEL_BYTES:].cast("Q")


class AccountWriter:
    """The worker's side: the devices count into the file, the metrics are sampled, the level is kept."""

    def __init__(self, fd: int, backends: Sequence[Backend], loop: Loop) -> None:
        """Closes `fd`; -1: nobody reads."""
        size = file_bytes(len(backends))
        pages = memoryview(bytearray(size))
        if fd >= 0:
            pages = memoryview(mmap.mmap(fd, size))
            os.close(fd)
        self._backends = backends
        self._loop = loop
        for index, backend in enumerate(backends):
            backend.use_account(pages[index * ACCOUNT_BYTES : (index + 1) * ACCOUNT_BYTES])
        base = len(backends) * ACCOUNT_BYTES
        self._ring = MetricsRing(pages[base : base + METRICS_BYTES])
        self._level, self._layers = _tail(pages[base + METRICS_BYTES :])
        self._before = self._layers.tolist()  # a predecessor's
        if self.level != DEFAULT:
            self.set_level(self.level)
        self._sample()

    @property
    def level(self) -> int:
        """The level of optimization."""
        return _level(self._level)

    def set_level(self, level: int) -> None:
        """Switch all devices, and their successors. Errors: ValueError for no such level."""
        level = Level(level)
        self._level[0] = level + 1
        for backend in self._backends:
            backend.set_level(level)
        self._loop.set_polling(POLLING_SECONDS if level >= Level.POLLING else 0.0)

    def _sample(self) -> None:
        depth = 0
        allowed = denied = size = 0
        for backend in self._backends:
            backend.stats.set_depth(backend.depth)
            depth += backend.depth
            account = backend.stats.account
            for op in backend.stats.ops:
                done, refused, moved = account.counted(op)
                allowed, denied, size = allowed + done, denied + refused, size + moved
        self._count_layers()
        cpu = time.clock_gettime_ns(time.CLOCK_PROCESS_CPUTIME_ID)
        self._ring.write(time.monotonic_ns(), allowed, size, denied, cpu, depth)
        self._loop.call_at(self._loop.now() + PERIOD, self._sample)

    def _count_layers(self) -> None:
        found = [
            list(layers(backend.snapshot()["firewall"]).values())
            for backend in self._backends
            if backend.judge is not None
        ]
        for index, before in enumerate(self._before):
            self._layers[index] = before + sum(one[index] for one in found)


class AccountReader:
    """The other side: figures of a VM's devices, in place, without a word to its worker."""

    def __init__(self, run_dir: Path) -> None:
        """Errors: OSError when there is no such file, or it is not one of ours."""
        fd = os.open(run_dir / FILE_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            devices = (size - file_bytes(0)) // ACCOUNT_BYTES
            if devices < 0 or size != file_bytes(devices):
                raise OSError(f"{run_dir / FILE_NAME} has {size} bytes: it is of another version")
            self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        pages = memoryview(self._map)
        self.accounts = [
            Account(pages[index * ACCOUNT_BYTES : (index + 1) * ACCOUNT_BYTES].cast("Q"))
            for index in range(devices)
        ]
        base = devices * ACCOUNT_BYTES
        self._metrics = pages[base : base + METRICS_BYTES].cast("Q")
        self._level, self._layers = _tail(pages[base + METRICS_BYTES :])

    @property
    def level(self) -> int:
        """The level of optimization."""
        return _level(self._level)

    def layers(self) -> dict[str, int]:
        """How many frames each layer of the firewall decided, in all workers of the VM."""
        return dict(zip(LAYERS, self._layers, strict=True))

    def metrics(self, last: int) -> list[dict[str, Any]]:
        """The last samples, oldest first."""
        return read_samples(self._metrics, last)

    def devices(self) -> dict[str, Account]:
        """The accounts that a worker has begun, by the device's name."""
        return {account.name: account for account in self.accounts if account.is_known}


def layers(firewall: Mapping[str, Any]) -> dict[str, int]:
    """Of LAYERS, from what a card's snapshot says of its firewall."""
    cache, judged = firewall["cache"], {layer: firewall["layers"][layer] for layer in _JUDGED}
    rest = cache["asked"] + cache["offload"] - sum(judged.values())
    return {"cache": cache["remembered"], **judged, "guard": max(0, rest)}


def hit_ratio(counts: Mapping[str, int]) -> dict[str, float]:
    """Each layer's share of all frames, 0 to 1; 0 when there were none."""
    frames = sum(counts.values())
    return {layer: count / frames if frames else 0.0 for layer, count in counts.items()}

"""The parts of the service that a machine needs beside its devices, as small Protocols: a network, a platform, a TPM.

The service gives the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.host.process import ProcessId
from rayos_vmm.machine.record import Record
from rayos_vmm.qemu.boot import Boot
from rayos_vmm.qemu.platform import Launch


@dataclass(frozen=True, slots=True)
class MeasuredTpm:
    """A running TPM, and the boot whose files are sealed copies; QEMU has to inherit the descriptors."""

    process: ProcessId
    socket: Path
    arguments: list[str]
    boot: Boot
    descriptors: tuple[int, ...]
    close: Callable[[], None]


class Tpms(Protocol):
    """Brings a machine's TPM into being and takes it away."""

    async def start(
        self, record: Record, boot: Boot, *, runtime: Path, state: Path, log: Path, slot: int
    ) -> MeasuredTpm: ...
    async def stop(self, process: ProcessId, runtime: Path) -> None: ...
    async def follow(self, runtime: Path, on_change: Callable[[str, str], None]) -> None: ...
    def refusal(self, runtime: Path) -> str: ...
    async def watch(self, process: ProcessId) -> str: ...
    def note_death(self, runtime: Path, reason: str) -> None: ...


class Network(Protocol):
    """Where machines get their taps and addresses."""

    def mac(self, vm: str) -> str: ...
    async def open_tap(
        self, vm: str, mac: str, *, mtu: int, queues: int, upstream: str | None
    ) -> tuple[str, list[int]]: ...


class Platform(Protocol):
    """Where QEMU and our guest come from."""

    async def launch(self, spec: VmSpec) -> Launch: ...

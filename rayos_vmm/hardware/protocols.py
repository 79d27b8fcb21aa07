"""Devices as the rest of the service sees them: brought into being, spoken with, taken away.

`keeper.py` has the real ones; a test of the life cycle alone gives `NoHardware`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.host.process import ProcessId
from rayos_vmm.shared.packet import Head, Stats
from rayos_vmm.shared.timed import Span
from rayos_vmm.shared.view import DisplayInfo, FaultState, PortState

# In the machine's state directory, the standard error of its keeper.
WORKER_LOG: Final = "worker.log"


@dataclass(frozen=True, slots=True)
class DiskImage:
    """An image to serve: its file exists."""

    path: Path
    is_read_only: bool
    serial: str
    queues: int = 1
    format: str = "raw"
    bus: str = "virtio"
    #: The disk's, where that is more than the image's.
    size_bytes: int = 0
    block_bytes: int = 512
    is_unsafe: bool = False


@dataclass(frozen=True, slots=True)
class Plugged:
    """The backends' sockets, for QEMU, and the process that keeps them."""

    keeper: ProcessId | None = None
    readers: tuple[ProcessId, ...] = ()  # of disks that are not raw
    slot: int = -1  # whose users its processes take (`identity`)
    sockets: Mapping[str, Path] = field(default_factory=dict)  # of the vhost-user devices, by name
    console_ports: tuple[Path, ...] = ()  # in the place of a vhost-user console
    ports: int = 0


@dataclass(frozen=True, slots=True)
class DisplayFrame:
    """One picture: `height` rows of `stride` bytes, pixels as BGRX."""

    width: int
    height: int
    stride: int
    pixels: bytes
    serial: int


class Caught(Protocol):
    """A piece of a capture (`worker.client.Caught`)."""

    @property
    def records(self) -> bytes: ...
    @property
    def offset_ns(self) -> int: ...
    @property
    def seen(self) -> int: ...
    @property
    def dropped(self) -> int: ...


class Worker(Protocol):
    """The connection to a machine's device worker; it survives the worker's replacement."""

    async def stats(self) -> Stats: ...
    def capture(self, snap: int) -> AsyncGenerator[Caught, None]: ...
    async def limit(self, device: str, limits: Mapping[str, int]) -> dict[str, int]: ...
    async def set_level(self, level: int) -> int: ...
    async def inject(self, device: str, events: Sequence[tuple[int, int, int]]) -> None: ...
    async def console_write(self, port: int, data: bytes) -> None: ...
    async def resize_disk(self, device: str) -> int: ...
    async def set_faults(self, device: str, rules: Sequence[Mapping[str, Any]], seed: int) -> None: ...
    async def faults(self, device: str) -> list[FaultState]: ...
    async def console_resize(self, port: int, columns: int, rows: int) -> None: ...
    def console_stream(
        self, port: int, *, since: int | None = None, hold: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[tuple[int, bytes]]]: ...
    async def ports(self) -> list[PortState]: ...
    def console_pieces(
        self, port: int, *, since: int = 0, follow: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[Span]]: ...
    async def display_info(self) -> DisplayInfo: ...
    async def screenshot(self, scanout: int = 0, *, with_cursor: bool = False) -> DisplayFrame: ...
    async def gpu_resize(self, scanout: int, width: int, height: int) -> None: ...
    async def wait_damage(self, since: int, scanout: int = 0) -> tuple[int, int, int, int, int]: ...


class Hardware(Protocol):
    """Brings a machine's devices into being and takes them away."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """As long as the service is: what it needs to plug. Backends outlive it."""
        ...

    async def plug(
        self,
        spec: VmSpec,
        *,
        runtime: Path,
        logs: Path,
        disks: Sequence[DiskImage],
        tap_fds: Sequence[int],
        mac: str,
        has_console: bool,
        needs_vga: bool,
    ) -> Plugged:
        """Starts the backends. Takes `tap_fds` over, whatever happens. Nothing is left after an error."""
        ...

    def connect(self, runtime: Path) -> AbstractAsyncContextManager[Worker | None]:
        """A connection to the backends of a running machine."""
        ...

    async def follow(self, runtime: Path, on_event: Callable[[Head], None]) -> None:
        """Calls back with what happens to the backends ({"event": …}) until they end."""
        ...

    async def watch(self, keeper: ProcessId) -> int | None:
        """Returns when the backends' process has ended: its status, minus the signal's number, or None."""
        ...

    async def unplug(self, keeper: ProcessId, runtime: Path) -> None:
        """Ends the backends. Safe to call again."""
        ...


class NoHardware:
    """No devices at all: the guest has its processor, memory and serial line."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def plug(
        self,
        spec: VmSpec,
        *,
        runtime: Path,
        logs: Path,
        disks: Sequence[DiskImage],
        tap_fds: Sequence[int],
        mac: str,
        has_console: bool,
        needs_vga: bool,
    ) -> Plugged:
        return Plugged()

    @asynccontextmanager
    async def connect(self, runtime: Path) -> AsyncIterator[Worker | None]:
        yield None

    async def follow(self, runtime: Path, on_event: Callable[[Head], None]) -> None:
        return None

    async def watch(self, keeper: ProcessId) -> int | None:
        return None

    async def unplug(self, keeper: ProcessId, runtime: Path) -> None:
        return None

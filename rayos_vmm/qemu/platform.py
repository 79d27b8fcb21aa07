"""QEMU, the accelerator and our own guest, from `images/`: found once, when first needed, in a thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import trio

from rayos_images.accel import Accel
from rayos_images.accel import probe as probe_accelerator
from rayos_images.arch import DEFAULT
from rayos_images.arch import Architecture as Images
from rayos_images.cache import Cache
from rayos_images.errors import ImageError
from rayos_images.initramfs import build as build_initramfs
from rayos_images.kernel import build as build_kernel
from rayos_images.kernel import command_line
from rayos_images.qemu import Qemu
from rayos_images.qemu import find as find_qemu
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import GuestGone
from rayos_vmm.events import EventLog
from rayos_vmm.qemu.arch import architecture_of
from rayos_vmm.qemu.boot import Boot, inspect

# A kernel that panics restarts at once: with its last words on the serial line that tells a panic from a hang
# also without pvpanic.
APPEND: Final = "panic=-1"
_T = TypeVar("_T")


class QemuView(msgspec.Struct, frozen=True, kw_only=True):
    """A QEMU: where it comes from, and what it can do for us."""

    version: str
    source: str
    has_console: bool
    has_display_events: bool


class AcceleratorView(msgspec.Struct, frozen=True, kw_only=True):
    """An accelerator, and why it is this one."""

    name: str
    reason: str


class PlatformView(msgspec.Struct, frozen=True, kw_only=True):
    """QEMU and the accelerator."""

    qemu: QemuView
    accelerator: AcceleratorView


@dataclass(frozen=True, slots=True)
class Launch:
    """Which QEMU, how, and what it boots."""

    argv: tuple[str, ...]
    accelerator: str
    has_pvpanic: bool
    has_console: bool
    has_reconnect_ms: bool
    has_dbus_display: bool
    boot: Boot


class Platform:
    """The kernel, initramfs, QEMU and accelerator from `images/`, remembered."""

    def __init__(self, cache: Path, events: EventLog) -> None:
        self._cache = Cache(cache)
        self._events = events
        self._lock = trio.Lock()
        self._qemu: dict[str, Qemu] = {}  # by the architecture's name, as those below
        self._accelerator: dict[str, Accel] = {}
        self._guest: dict[str, tuple[Path, Path]] = {}

    async def qemu(self, architecture: Images = DEFAULT) -> Qemu:
        """The QEMU to use for an architecture; the first call may download one.

        Raises:
            GuestGone: there is none and none can be had.
        """
        async with self._lock:
            if architecture.name not in self._qemu:
                self._qemu[architecture.name] = await self._build(
                    "qemu", lambda: find_qemu(self._cache, architecture)
                )
            return self._qemu[architecture.name]

    async def accelerator(self, architecture: Images = DEFAULT) -> Accel:
        """KVM if it works here, else TCG; with the reason."""
        qemu = await self.qemu(architecture)
        async with self._lock:
            if architecture.name not in self._accelerator:
                self._accelerator[architecture.name] = await self._build(
                    "accelerator", lambda: probe_accelerator(self._cache, qemu)
                )
            return self._accelerator[architecture.name]

    async def guest(self, architecture: Images = DEFAULT) -> tuple[Path, Path]:
        """Our guest's kernel and initramfs; the first call downloads and builds them.

        Raises:
            GuestGone: they cannot be built.
        """

        def both() -> tuple[Path, Path]:
            kernel = build_kernel(self._cache, architecture)
            return kernel.vmlinux, build_initramfs(self._cache, kernel)

        async with self._lock:
            if architecture.name not in self._guest:
                self._guest[architecture.name] = await self._build("guest", both)
            return self._guest[architecture.name]

    async def describe(self) -> PlatformView:
        """QEMU and the accelerator, as `info` shows them."""
        qemu, accelerator = await self.qemu(), await self.accelerator()
        return PlatformView(
            qemu=QemuView(
                version=qemu.version,
                source=qemu.source,
                has_console=qemu.has_console,
                has_display_events=qemu.has_dbus_display,
            ),
            accelerator=AcceleratorView(name=accelerator.name, reason=accelerator.reason),
        )

    async def launch(self, spec: VmSpec) -> Launch:
        """How this machine is started.

        Raises:
            Invalid: a file of the specification is missing or of no use.
            GuestGone: QEMU or our guest cannot be had.
        """
        boot = await (self._our_boot(spec) if spec.is_our_guest else trio.to_thread.run_sync(inspect, spec))
        images = architecture_of(spec).images
        qemu, accelerator = await self.qemu(images), await self.accelerator(images)
        return Launch(
            argv=qemu.argv,
            accelerator=accelerator.name,
            has_pvpanic=True,
            has_console=qemu.has_console,
            has_reconnect_ms=_version(qemu.version) >= (9, 2),
            has_dbus_display=qemu.has_dbus_display,
            boot=boot,
        )

    async def _our_boot(self, spec: VmSpec) -> Boot:
        images = architecture_of(spec).images
        kernel, initrd = await self.guest(images)
        ours = command_line(images, has_display=spec.gpu.enabled)
        parts = [ours, APPEND, spec.append]
        return Boot(kernel=kernel, initrd=initrd, append=" ".join(part for part in parts if part))

    async def _build(self, what: str, function: Callable[[], _T]) -> _T:
        self._events.publish("images.building", what=what)
        try:
            result = await trio.to_thread.run_sync(function)
        except ImageError as error:
            raise GuestGone(str(error), hint="run `rayos doctor`", code="images_failed") from None
        self._events.publish("images.built", what=what)
        return result


def _version(text: str) -> tuple[int, ...]:
    """(11, 1) of "11.1.3". Devices are probed; an option of a chardev cannot be asked for over QMP."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())

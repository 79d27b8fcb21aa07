"""Every device as a hostile guest sees it: how to run it, which queue it takes requests on, what an honest request is.

A case is an attack and the error class it must end in; `judge` runs it and checks what every case has in common:
the device is alive, serves honest requests afterwards (class Q: after a reset), and has as many descriptors as before.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, TypeVar

from rayos_devices.backend import Backend
from rayos_devices.blk.backend import BlkBackend
from rayos_devices.blk.store import RawStore
from rayos_devices.console.backend import ConsoleBackend
from rayos_devices.console.port import PortSpec
from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.input.backend import InputBackend
from rayos_devices.loop import Loop
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.port import EchoPort, open_tap
from rayos_devices.rng.backend import RngBackend
from rayos_devices.virtio.packed import JOURNAL_BYTES
from rayos_vmm.shared import spec
from tests.framework.driver import DriverQueue
from tests.framework.echo import EchoBackend
from tests.framework.frontend import ANSWER_TIMEOUT
from tests.framework.kept import Sandboxed
from tests.framework.target import Footprint, Rig, Served, Stepped

B = TypeVar("B", bound=Backend)

IMAGE_BYTES: Final = 1 << 20
SECTOR: Final = bytes(range(256)) * 2
PROCESS_RSS_LIMIT: Final = 256 << 20


class Class(Enum):
    """The class that an attack must end in (rayos_devices.errors)."""

    FINE = "served"
    REQUEST = "R"
    CHAIN = "C"
    QUEUE = "Q"


@dataclass(frozen=True)
class Device:
    """`queue` is where the driver sends requests; `honest` does one and checks the answer."""

    name: str
    queues: int
    queue: int
    make: Callable[[Loop, Path], Backend]
    honest: Callable[[Rig], None]

    @contextmanager
    def stepped(self, directory: Path) -> Iterator[Stepped[Backend]]:
        with Stepped(lambda loop: offering_packed(self.make(loop, directory))) as target:
            yield target

    @contextmanager
    def served(self, directory: Path) -> Iterator[Sandboxed]:
        """The real thing: a keeper and its sandboxed worker."""
        fds: list[int] = []
        device = spec.Device(kind=self.name, name=self.name, packed=True)
        if self.name == "blk":
            fds = [os.open(image(directory), os.O_RDWR)]
            device = spec.Device(kind="blk", name="blk", fd=fds[0], serial="hostile", packed=True)
        elif self.name == "net":
            fds = open_tap("hostile%d")
            device = spec.Device(kind="net", name="net", queue_fds=tuple(fds), packed=True)
        try:
            target = Sandboxed(directory, device)
        finally:
            for fd in fds:
                os.close(fd)
        with target:
            yield target


def offering_packed(backend: B) -> B:
    """The backend, with packed rings on offer and journals of this process."""
    backend.offer_packed([memoryview(bytearray(JOURNAL_BYTES)).cast("Q") for _ in backend.queues])
    return backend


def image(directory: Path) -> Path:
    """A disk whose every sector says SECTOR."""
    path = directory / "image"
    if not path.exists():
        path.write_bytes(SECTOR * (IMAGE_BYTES // len(SECTOR)))
    return path


def make_blk(loop: Loop, directory: Path) -> Backend:
    return BlkBackend("blk", loop, RawStore(os.open(image(directory), os.O_RDWR)), serial="hostile")


def honest_echo(rig: Rig) -> None:
    assert rig.request(b"ping", 4) == b"ping"


def honest_blk(rig: Rig) -> None:
    answer = rig.request(struct.pack("<IIQ", 0, 0, 3), 513)
    assert answer == SECTOR + b"\0"


def honest_net(rig: Rig) -> None:
    assert rig.request(bytes(12) + b"\xff" * 12 + b"\x08\x00" + bytes(46), index=1) == b""


def honest_gpu(rig: Rig) -> None:
    answer = rig.request(struct.pack("<IIQII", 0x100, 0, 0, 0, 0), 408)
    assert struct.unpack_from("<I", answer)[0] == 0x1101


def honest_input(rig: Rig) -> None:
    assert rig.request(struct.pack("<HHI", 0x11, 0, 1), index=1) == b""


def honest_console(rig: Rig) -> None:
    assert rig.request(b"hello", index=1) == b""


def honest_rng(rig: Rig) -> None:
    answer = rig.request(b"", 64)
    assert len(answer) == 64 and answer != bytes(64)


DEVICES: Final = {
    device.name: device
    for device in (
        Device("echo", 2, 0, lambda loop, _: EchoBackend(loop), honest_echo),
        Device("blk", 1, 0, make_blk, honest_blk),
        Device("net", 2, 1, lambda loop, _: NetBackend("net", loop, EchoPort()), honest_net),
        Device("gpu", 2, 0, lambda loop, _: GpuBackend("gpu", loop), honest_gpu),
        Device("input", 2, 1, lambda loop, _: InputBackend("input", loop, "keyboard"), honest_input),
        Device(
            "console",
            4,
            1,
            lambda loop, _: ConsoleBackend("console", loop, ports=[PortSpec("console", is_console=True)]),
            honest_console,
        ),
        Device("rng", 1, 0, lambda loop, _: RngBackend("rng", loop), honest_rng),
    )
}

Attack = Callable[[Rig, DriverQueue], list[int] | None]


class Idle:
    """A target's descriptors without a session; `check` waits for a process to be there again."""

    def __init__(self, target: Stepped[Backend] | Served) -> None:
        self._target = target
        self._here = Footprint()

    def check(self) -> None:
        """Errors: AssertionError for a dead process, descriptors or mappings left, or memory without bound."""
        target = self._target
        if not isinstance(target, Served):
            self._here.check()
            return
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while target.pids and target.fd_count != target.idle_fds:
            assert time.monotonic() < deadline, "descriptors were left open"
            time.sleep(0.001)
        assert target.pids, "the worker died"
        for pid in target.pids:
            assert "guest-ram" not in Path(f"/proc/{pid}/maps").read_text(), "memory is still mapped"
        assert target.rss_bytes < PROCESS_RSS_LIMIT


def wait_for(rig: Rig, condition: Callable[[], bool], timeout: float = ANSWER_TIMEOUT) -> bool:
    """Let the device act until `condition` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        rig.settle()
    return True


def judge(
    device: Device,
    target: Stepped[Backend] | Served,
    expected: Class,
    attack: Attack,
    *,
    packed: bool = False,
) -> None:
    """Run one attack. It offers and kicks, and returns the heads whose used entries are judged (none: nothing is)."""
    idle = Idle(target)
    with Rig(target, device.queues, packed=packed) as rig:
        queue = rig.queues[device.queue]
        device.honest(rig)
        heads = attack(rig, queue)
        if expected is Class.QUEUE:
            assert wait_for(rig, queue.has_error), "the error eventfd was not raised"
            seen = queue.used_index
            queue.set_avail_index(seen)
            queue.kick(always=True)
            rig.settle()
            assert queue.used_index == seen, "a broken queue was parsed again"
            assert not queue.has_error(), "told more than once"
            rig.restart(device.queue)
        elif heads is not None:
            used = dict(rig.wait_used(device.queue, len(heads)))
            assert sorted(used) == sorted(heads)
            if expected is Class.CHAIN:
                assert set(used.values()) == {0}, "a chain fault comes back with nothing written"
            assert not queue.has_error()
        device.honest(rig)
    with Rig(target, device.queues) as rig:
        device.honest(rig)
    idle.check()

"""Kill -9 at every instruction that matters, without a process: for devices whose state outlives their worker.

A `Killer` counts the instructions of ``devices/`` that can change what others see (a store into a buffer, a call in a
function that writes to a descriptor) and stops the code right before a chosen one, as kill -9 would: no `except`, no
clean-up. Between two of them a kill makes no difference. A `Bench` holds what survives (guest memory, rings, the
device's shared memory) and builds the successor on it, as the keeper does.
"""

from __future__ import annotations

import dis
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final, Generic, TypeVar

import rayos_devices
from rayos_devices.backend import Backend
from rayos_devices.loop import Loop
from rayos_devices.virtio.memory import GuestMemory
from rayos_devices.virtio.packed import JOURNAL_WORDS
from tests.framework.driver import DriverQueue, descriptor_table_bytes
from tests.framework.guest_memory import GuestRam
from tests.framework.packed_driver import PackedDriverQueue

B = TypeVar("B", bound=Backend)
R = TypeVar("R")

_OURS: Final = str(Path(rayos_devices.__path__[0]))
#: Its memory fence takes and gives back a lock of this process, which a real kill would end.
_NOT_KILLED_IN: Final = str(Path(_OURS, "native.py"))
_STORES: Final = frozenset(("STORE_SUBSCR", "STORE_SLICE"))
_CALLS: Final = frozenset(("CALL", "CALL_FUNCTION_EX", "CALL_KW"))
_WRITERS: Final = frozenset(("pwrite", "pwritev", "send", "sendmsg", "eventfd_write", "pack_into"))


class Killed(BaseException):
    """The worker is gone. Nothing of ours catches it."""


class Killer:
    """Kills before the effect with each number in `targets`, counted from 0 over everything that runs under it."""

    def __init__(self, *targets: int) -> None:
        self.count = 0
        self._targets = frozenset(targets)
        self._offsets: dict[CodeType, frozenset[int]] = {}

    def run(self, function: Callable[[], R]) -> R:
        """Run `function`. Errors: Killed."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            return function()
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if not name.startswith(_OURS) or name == _NOT_KILLED_IN:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._instruction

    def _instruction(self, frame: FrameType, event: str, _argument: Any) -> Callable[..., Any]:
        if event == "opcode" and frame.f_lasti in self._effects(frame.f_code):
            self.count += 1
            if self.count - 1 in self._targets:
                raise Killed
        return self._instruction

    def _effects(self, code: CodeType) -> frozenset[int]:
        offsets = self._offsets.get(code)
        if offsets is None:
            effects = _STORES | _CALLS if _WRITERS & set(code.co_names) else _STORES
            offsets = frozenset(i.offset for i in dis.get_instructions(code) if i.opname in effects)
            self._offsets[code] = offsets
        return offsets


class Bench(Generic[B]):
    """A guest's memory and rings, and a backend on them that can be killed and replaced.

    `make(loop)` builds each backend on whatever memory the test keeps for it. `features` are what the driver acked.
    """

    def __init__(
        self,
        make: Callable[[Loop], B],
        features: int,
        killer: Killer,
        *,
        size: int = 16,
        packed: bool = False,
    ) -> None:
        self._make = make
        self._features = features
        self.killer = killer
        self.ram = GuestRam(1 << 20)
        self.kills = 0
        self.loop = Loop()
        self.backend = make(self.loop)
        kind = PackedDriverQueue if packed else DriverQueue
        self.queues = [kind(self.ram, size) for _ in self.backend.queues]
        self._journals = [memoryview(array("Q", bytes(8 * JOURNAL_WORDS))) for _ in self.queues]
        self.attach(resumed=False)

    def attach(self, *, resumed: bool) -> None:
        """Start the backend's queues, as its session does."""
        backend = self.backend
        backend.set_features(self._features)
        memory = GuestMemory()
        memory.replace([self.ram.spec], [self.ram.fd])
        for vring, driver, journal in zip(backend.queues, self.queues, self._journals, strict=True):
            vring.journal = journal
            vring.attach(
                memory,
                driver.size,
                memory.view(driver.descriptors, descriptor_table_bytes(driver.size)),
                memory.view(driver.avail, driver.avail_bytes),
                memory.view(driver.used, driver.used_bytes),
                base=driver.start,
                resumed=resumed,
                packed=driver.is_packed,
                event_idx=True,
                indirect=True,
            )
            backend.start_queue(vring.index, resumed=resumed)

    def call(self, operation: Callable[[B], R]) -> R:
        """A host's operation; a successor is asked again, as a client that got no answer does."""
        while True:
            try:
                return self.killer.run(lambda: operation(self.backend))
            except Killed:
                self._replace()

    def run(self) -> None:
        """Let the device do all it has to do."""
        while True:
            try:
                self.killer.run(self._run)
                return
            except Killed:
                self._replace()

    def _run(self) -> None:
        for vring in self.backend.queues:
            while self.backend.run_queue(vring.index):
                pass
        for _ in range(8):
            self.loop.step(0)

    def _replace(self) -> None:
        """A successor takes over; it may be killed while it does."""
        self.kills += 1
        while True:
            self.loop.close()
            self.loop = Loop()

            def take_over() -> None:
                self.backend = self._make(self.loop)
                self.attach(resumed=True)

            try:
                self.killer.run(take_over)
                return
            except Killed:
                self.kills += 1

    def close(self) -> None:
        self.loop.close()
        for vring in self.backend.queues:
            vring.stop()
        for driver in self.queues:
            driver.close()
        if self.ram.fd >= 0:
            self.ram.close()


def every_kill(scenario: Callable[[Killer], None], *, step: int = 1) -> Iterator[int]:
    """Run `scenario` once unharmed, then with a kill at every `step`-th effect; yields each one's number."""
    killer = Killer()
    scenario(killer)
    for target in range(0, killer.count, step):
        scenario(Killer(target))
        yield target


def pairs(count: int, distances: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Two kills, the second while or soon after the successor takes over."""
    for distance in distances:
        for first in range(0, count, distance):
            yield first, first + distance

"""How busy the machines' device workers are, and moving them between processors under their guests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import msgspec
import trio

from rayos_vmm.errors import GuestGone, Invalid, NotFound
from rayos_vmm.events import EventLog
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.host.process import STARTTIME_FIELD, stat_fields
from rayos_vmm.machine.machine import Machine
from rayos_vmm.service.balance import (
    Automatic,
    Balancer,
    BalanceStatus,
    LoadView,
    Move,
    Moved,
    Rebalanced,
    Sample,
)
from rayos_vmm.shared.packet import WorkerError, WorkerGone

#: Seconds between two looks at the workers' counters, when somebody asks and when nobody does.
WINDOW_S: Final = 1.0
PERIOD_S: Final = 2.0
_UTIME_FIELD: Final = 14  # proc_pid_stat(5)
_STIME_FIELD: Final = 15
_PROCESSOR_FIELD: Final = 39


class _Look(NamedTuple):
    start_time: int
    sample: Sample


class Workers:
    """The workers of all running machines. `find` gives a machine or raises NotFound. Use `run`."""

    def __init__(
        self,
        machines: Callable[[], list[Machine]],
        find: Callable[[str], Machine],
        events: EventLog,
        *,
        period_s: float = PERIOD_S,
    ) -> None:
        self._machines = machines
        self._find = find
        self._events = events
        self._period_s = period_s
        self._balancer = Balancer(sorted(os.sched_getaffinity(0)))
        self._automatic = Automatic(self._balancer)
        self._lock = trio.Lock()
        self._switched = trio.Event()
        self._known: dict[str, tuple[int, int]] = {}  # each worker's pid, and when that process started

    # -- questions -----------------------------------------------------------------------------------------------

    async def load(self) -> LoadView:
        """Load by worker and by core over WINDOW_S, imbalance, variance, moves so far."""
        async with self._lock:
            await self._measure()
            return self._snapshot()

    def status(self) -> BalanceStatus:
        """As last measured, without the single workers."""
        found = self._snapshot()
        return BalanceStatus(
            imbalance=found.imbalance, variance=found.variance, moves=found.moves, automatic=found.automatic
        )

    def _snapshot(self) -> LoadView:
        return self._balancer.snapshot(self._automatic.snapshot())

    # -- moves ---------------------------------------------------------------------------------------------------

    async def rebalance(self) -> Rebalanced:
        """Measure, and move what is worth it. The answer has the load before, and each move with its pause."""
        async with self._lock:
            await self._measure()
            made = []
            for move in self._balancer.plan(now=trio.current_time()):
                pause_ms = await self._try(move)
                if pause_ms is not None:
                    self._balancer.moved(move, now=trio.current_time())
                    made.append(Moved(vm=move.vm, core=move.target, pause_ms=pause_ms))
            return Rebalanced(**msgspec.structs.asdict(self._snapshot()), made=made)

    async def move(self, name: str, core: int) -> Moved:
        """Hand a machine's devices over to a new worker on another processor; the guest does not notice.

        Raises:
            NotFound: there is no such machine.
            Conflict: it is not running.
            Invalid: there is no such processor.
            GuestGone: its devices are gone.
        """
        machine = self._find(name)
        machine.need_worker()
        async with self._lock:
            try:
                pause_ms = await self._hand_over(machine, core)
            except WorkerError as error:
                raise Invalid(str(error)) from None
            except WorkerGone as error:
                raise GuestGone(str(error)) from None
            self._balancer.moved(Move(name, -1, core), now=trio.current_time())
        return Moved(vm=name, core=core, pause_ms=pause_ms)

    async def _try(self, move: Move, **why: Any) -> float | None:
        """The pause in milliseconds; None when the machine has ended meanwhile."""
        try:
            return await self._hand_over(self._find(move.vm), move.target, source=move.source, **why)
        except (WorkerError, WorkerGone, NotFound):
            return None

    async def _hand_over(self, machine: Machine, core: int, **why: Any) -> float:
        self._known.pop(machine.name, None)
        client = KeeperClient(machine.runtime)
        try:
            pause_ms = await client.move_worker([core])
        finally:
            client.close()
        self._events.publish("devices.moved", machine.name, core=core, pause_ms=pause_ms, **why)
        return pause_ms

    # -- by itself -----------------------------------------------------------------------------------------------

    def switch(self, is_on: bool) -> BalanceStatus:
        """Whether workers are moved without being asked."""
        self._automatic.is_on = is_on
        switched, self._switched = self._switched, trio.Event()
        switched.set()
        return self.status()

    async def run(self) -> None:
        """Measures and moves as long as it is switched on. Ends when cancelled."""
        while True:
            if not self._automatic.is_on:
                await self._switched.wait()
                continue
            await trio.sleep(self._period_s)
            if len(self._running()) < 2:
                continue  # there is nothing to even out
            async with self._lock:
                await self._observe()
                move = self._automatic.check(now=trio.current_time())
                if move is None:
                    continue
                why = {"automatic": True, "imbalance": round(self._balancer.imbalance, 4)}
                if await self._try(move, **why) is not None:
                    self._automatic.moved(move, now=trio.current_time())

    # -- measuring -----------------------------------------------------------------------------------------------

    def _running(self) -> dict[str, Machine]:
        return {one.name: one for one in self._machines() if one.worker is not None}

    async def _measure(self) -> None:
        await self._observe()
        await trio.sleep(WINDOW_S)
        await self._observe()

    async def _observe(self) -> None:
        """Takes the workers' counters; keepers are asked only for workers that are new."""
        running = self._running()
        looks = dict(self._seen())
        async with trio.open_nursery() as nursery:
            for name in running.keys() - looks.keys():
                nursery.start_soon(self._ask, running[name])
        looks = {name: look for name, look in self._seen() if name in running}
        self._known = {name: self._known[name] for name in looks}
        samples = {name: look.sample for name, look in looks.items()}
        self._balancer.observe(samples, now=trio.current_time())

    def _seen(self) -> Iterator[tuple[str, _Look]]:
        for name, (pid, start_time) in self._known.items():
            look = _stat(pid)
            if look is not None and look.start_time == start_time:
                yield name, look

    async def _ask(self, machine: Machine) -> None:
        client = KeeperClient(machine.runtime)
        try:
            pid = int((await client.status())["worker_pid"])
        except WorkerGone:
            return
        finally:
            client.close()
        look = _stat(pid)
        if look is not None:
            self._known[machine.name] = pid, look.start_time


def _stat(pid: int) -> _Look | None:
    try:
        fields = stat_fields(pid)
        cores = os.sched_getaffinity(pid)
    except OSError:
        return None
    ticks = int(fields[_UTIME_FIELD]) + int(fields[_STIME_FIELD])
    core = cores.pop() if len(cores) == 1 else int(fields[_PROCESSOR_FIELD])
    return _Look(int(fields[STARTTIME_FIELD]), Sample(pid, ticks / os.sysconf("SC_CLK_TCK"), core))

"""How busy the machines' device workers are, and moving them between processors under their guests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import trio

from rayos_vmm.balance import Balancer, Move, Sample
from rayos_vmm.worker.client import KeeperClient, WorkerError, WorkerGone

#: Seconds between two looks at the workers' counters.
WINDOW_S: Final = 1.0
_UTIME: Final = 11  # proc_pid_stat(5), counted behind the command's closing parenthesis
_STIME: Final = 12
_PROCESSOR: Final = 36


class Workers:
    """The workers of all running machines; `machines` of each call is their runtime directories by name."""

    def __init__(self) -> None:
        self._balancer = Balancer(sorted(os.sched_getaffinity(0)))
        self._lock = trio.Lock()

    async def load(self, machines: Mapping[str, Path]) -> dict[str, Any]:
        """Load by worker and by core over WINDOW_S, imbalance, variance, moves so far."""
        async with self._lock:
            await self._observe(machines)
            return self._balancer.snapshot()

    async def rebalance(self, machines: Mapping[str, Path]) -> dict[str, Any]:
        """Measure, and move what is worth it. The answer has the load before, and each move with its pause."""
        async with self._lock:
            await self._observe(machines)
            made = []
            for move in self._balancer.plan(now=trio.current_time()):
                pause_ms = await _move(machines[move.vm], move.target)
                if pause_ms is not None:
                    self._balancer.moved(move, now=trio.current_time())
                    made.append(_shown(move, pause_ms))
            return {**self._balancer.snapshot(), "made": made}

    async def move(self, vm: str, machines: Mapping[str, Path], core: int) -> dict[str, Any]:
        """Move one worker to a core, whatever its load.

        Raises:
            WorkerError: there is no such core.
            WorkerGone: its devices are gone.
        """
        async with self._lock:
            client = KeeperClient(machines[vm])
            try:
                pause_ms = await client.move_worker([core])
            finally:
                client.close()
            move = Move(vm, -1, core)
            self._balancer.moved(move, now=trio.current_time())
            return _shown(move, pause_ms)

    async def _observe(self, machines: Mapping[str, Path]) -> None:
        pids: dict[str, tuple[int, list[int]]] = {}

        async def ask(vm: str, runtime: Path) -> None:
            client = KeeperClient(runtime)
            try:
                status = await client.status()
                pids[vm] = status["worker_pid"], status["cores"]
            except WorkerGone:
                return
            finally:
                client.close()

        async with trio.open_nursery() as nursery:
            for vm, runtime in machines.items():
                nursery.start_soon(ask, vm, runtime)
        for pause in (WINDOW_S, 0.0):
            samples = {vm: sample for vm, (pid, cores) in pids.items() if (sample := _sample(pid, cores))}
            self._balancer.observe(samples, now=trio.current_time())
            await trio.sleep(pause)


def _shown(move: Move, pause_ms: float) -> dict[str, Any]:
    return {"vm": move.vm, "core": move.target, "pause_ms": pause_ms}


def _sample(pid: int, cores: list[int]) -> Sample | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    ticks = int(fields[_UTIME]) + int(fields[_STIME])
    core = cores[0] if cores else int(fields[_PROCESSOR])
    return Sample(pid, ticks / os.sysconf("SC_CLK_TCK"), core)


async def _move(runtime: Path, core: int) -> float | None:
    """The pause in milliseconds; None when the machine has ended meanwhile."""
    client = KeeperClient(runtime)
    try:
        return await client.move_worker([core])
    except (WorkerError, WorkerGone):
        return None
    finally:
        client.close()

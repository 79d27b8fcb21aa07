"""Spreads the machines' device workers over the processors by measured load. Sans-IO.

A worker is one thread, so what counts is how busy the busiest core is with workers. A plan takes the move that evens
the busiest and the idlest core out most, again and again, as long as it is worth it: by GAIN of a core at least, and
not for a worker that was moved less than REST seconds ago, so that a load that swings does not send workers to and fro.

`Automatic` acts without being asked once the busiest core is START above the idlest at LOOKS looks in a row, and goes
on until they are within STOP: a load between the two neither begins nor ends anything. It makes one move at a time,
PAUSE seconds apart, at most PER_MINUTE a minute.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

#: What a move must take off the difference between two cores, as a part of one core.
GAIN: Final = 0.1
#: Seconds.
REST: Final = 10.0
#: Between two samples that tell a load: the kernel counts in hundredths.
SHORTEST: Final = 0.4
#: Parts of one core: when the automatic balancer begins and stops.
START: Final = 0.3
STOP: Final = 0.15
LOOKS: Final = 3
#: Seconds between two of its moves.
PAUSE: Final = 5.0
PER_MINUTE: Final = 6
_MINUTE: Final = 60.0


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A device worker, the core that it runs on, and its share of that (0 to 1)."""

    vm: str
    pid: int
    core: int
    share: float


class CoreLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A core, how busy the workers on it are together (0 to 1), and how many they are."""

    core: int
    share: float
    workers: int


class AutomaticView(msgspec.Struct, frozen=True, kw_only=True):
    """Whether workers are moved without being asked, whether one is about to be, and how often that was done."""

    on: bool
    acting: bool
    moves: int
    held_back: int


class BalanceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How evenly the workers were spread when they were last measured."""

    imbalance: float
    variance: float
    moves: int
    automatic: AutomaticView


class LoadView(BalanceStatus, frozen=True, kw_only=True):
    """The load by worker and by core."""

    workers: list[WorkerLoad]
    cores: list[CoreLoad]


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that was moved, to which core, and for how many milliseconds nobody served."""

    vm: str
    core: int
    pause_ms: float


class Rebalanced(LoadView, frozen=True, kw_only=True):
    """The load before, and each move that was made."""

    made: list[Moved]


@dataclass(frozen=True, slots=True)
class Sample:
    """The use of a worker so far: CPU seconds; the core it is bound to or ran on last."""

    pid: int
    cpu_seconds: float
    core: int


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's share of one core since the sample before."""

    vm: str
    pid: int
    core: int
    share: float


@dataclass(frozen=True, slots=True)
class Move:
    """A worker that is better off on another core."""

    vm: str
    source: int
    target: int


class Balancer:
    """`cores` are those the workers may run on. `moves` counts what `moved` was told."""

    def __init__(self, cores: Sequence[int]) -> None:
        self.cores = sorted(cores)
        self.moves = 0
        self.loads: dict[str, Load] = {}
        self._before: dict[str, tuple[float, Sample]] = {}
        self._moved: dict[str, float] = {}

    def observe(self, samples: Mapping[str, Sample], *, now: float) -> None:
        """Take the workers' counters; a load is known from the second sample of the same process on.

        A sample that comes less than SHORTEST seconds after another tells where a worker is, and no load.
        """
        loads, kept = {}, {}
        for vm, sample in samples.items():
            when, before = self._before.get(vm, (now, sample))
            share = 0.0
            kept[vm] = now, sample
            if before.pid == sample.pid and now - when >= SHORTEST:
                share = max(0.0, sample.cpu_seconds - before.cpu_seconds) / (now - when)
            elif before.pid == sample.pid:
                kept[vm] = when, before
                share = self.loads[vm].share if vm in self.loads else 0.0
            loads[vm] = Load(vm, sample.pid, sample.core, share)
        self.loads, self._before = loads, kept
        self._moved = {vm: when for vm, when in self._moved.items() if vm in samples}

    def shares(self) -> dict[int, float]:
        """How much of each core the workers use."""
        shares = dict.fromkeys(self.cores, 0.0)
        for load in self.loads.values():
            if load.core in shares:
                shares[load.core] += load.share
        return shares

    @property
    def imbalance(self) -> float:
        """The busiest less the idlest core."""
        shares = self.shares().values()
        return max(shares) - min(shares)

    def plan(self, *, now: float) -> list[Move]:
        """The moves that are worth their while."""
        shares = self.shares()
        places = {vm: load.core for vm, load in self.loads.items() if load.core in shares}
        rested = {vm for vm in places if now - self._moved.get(vm, -REST) >= REST}
        moves: list[Move] = []
        while True:
            busiest, idlest = (
                max(shares, key=lambda c: (shares[c], -c)),
                min(shares, key=lambda c: (shares[c], c)),
            )
            gap = shares[busiest] - shares[idlest]
            # Moving `share` changes the difference to |gap - 2 share|.
            best = max(
                (vm for vm in sorted(rested) if places[vm] == busiest),
                key=lambda vm: gap - abs(gap - 2 * self.loads[vm].share),
                default=None,
            )
            if best is None or gap - abs(gap - 2 * self.loads[best].share) < GAIN:
                return moves
            share = self.loads[best].share
            shares[busiest] -= share
            shares[idlest] += share
            rested.discard(best)
            moves.append(Move(best, busiest, idlest))

    def moved(self, move: Move, *, now: float) -> None:
        """A move was made."""
        self.moves += 1
        self._moved[move.vm] = now

    def snapshot(self, automatic: AutomaticView) -> LoadView:
        """By worker and by core; `variance` is that of the cores' shares."""
        shares = self.shares()
        return LoadView(
            workers=[
                WorkerLoad(vm=load.vm, pid=load.pid, core=load.core, share=round(load.share, 4))
                for load in sorted(self.loads.values(), key=lambda load: (-load.share, load.vm))
            ],
            cores=[
                CoreLoad(
                    core=core,
                    share=round(share, 4),
                    workers=sum(load.core == core for load in self.loads.values()),
                )
                for core, share in shares.items()
            ],
            imbalance=round(self.imbalance, 4),
            variance=round(statistics.pvariance(shares.values()), 6),
            moves=self.moves,
            automatic=automatic,
        )


class Automatic:
    """`check` after each measurement. `held_back` counts looks at which a move had to wait for its time."""

    def __init__(self, balancer: Balancer, *, is_on: bool = False) -> None:
        self.is_on = is_on
        self.moves = 0
        self.held_back = 0
        self._balancer = balancer
        self._looks = 0
        self._tried: list[float] = []

    def check(self, *, now: float) -> Move | None:
        """The move to make now. It counts as tried, whatever comes of it; `moved` when it was made."""
        bound = STOP if self._looks >= LOOKS else START
        is_uneven = self.is_on and self._balancer.imbalance >= bound
        self._looks = self._looks + 1 if is_uneven else 0
        if self._looks < LOOKS:
            return None
        plan = self._balancer.plan(now=now)
        if not plan:
            return None
        self._tried = [when for when in self._tried if now - when < _MINUTE]
        if len(self._tried) >= PER_MINUTE or (self._tried and now - self._tried[-1] < PAUSE):
            self.held_back += 1
            return None
        self._tried.append(now)
        return plan[0]

    def moved(self, move: Move, *, now: float) -> None:
        """A move that `check` gave was made."""
        self.moves += 1
        self._balancer.moved(move, now=now)

    def snapshot(self) -> AutomaticView:
        """For callers."""
        return AutomaticView(
            on=self.is_on, acting=self._looks >= LOOKS, moves=self.moves, held_back=self.held_back
        )

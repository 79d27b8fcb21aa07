"""Workers are spread by what they use; a move has to be worth it, and a worker rests after one."""

from __future__ import annotations

import pytest

from rayos_vmm.service.balance import REST, AutomaticView, Balancer, Move, Sample, WorkerLoad

IDLE = AutomaticView(on=False, acting=False, moves=0, held_back=0)


def observed(*workers: tuple[float, int], cores: int = 2, now: float = 1.0) -> Balancer:
    """A balancer that saw workers a, b, … use `share` of the core that each is on, for a second."""
    balancer = Balancer(range(cores))
    names = "abcdefgh"[: len(workers)]
    before = {vm: Sample(ord(vm), 0.0, core) for vm, (_, core) in zip(names, workers, strict=True)}
    after = {vm: Sample(ord(vm), share, core) for vm, (share, core) in zip(names, workers, strict=True)}
    balancer.observe(before, now=now - 1)
    balancer.observe(after, now=now)
    return balancer


def test_a_busy_core_gives_to_an_idle_one() -> None:
    """Of two that share a core, one goes; what is even already stays."""
    (move,) = observed((0.5, 0), (0.4, 0)).plan(now=1)
    assert (move.source, move.target) == (0, 1)
    assert observed((0.5, 0), (0.4, 1)).plan(now=1) == []


def test_one_worker_alone_is_not_sent_to_and_fro() -> None:
    """Moving all the load of a core leaves the same imbalance."""
    assert observed((0.9, 0)).plan(now=1) == []


def test_several_moves_even_out() -> None:
    """Four on one of four cores end on one each, and no worker is moved twice."""
    moves = observed((0.5, 0), (0.5, 0), (0.5, 0), (0.5, 0), cores=4).plan(now=1)
    assert sorted(move.target for move in moves) == [1, 2, 3]
    assert len({move.vm for move in moves}) == 3


def test_a_small_gain_is_not_worth_a_move() -> None:
    """Below a tenth of a core nothing happens."""
    assert observed((0.04, 0), (0.04, 0)).plan(now=1) == []


def test_a_moved_worker_rests() -> None:
    """It is left where it is for a while, whatever its load does."""
    balancer = observed((0.6, 0), (0.3, 0))
    balancer.moved(Move("a", 0, 1), now=1)
    balancer.observe({"a": Sample(9, 0.0, 1), "b": Sample(98, 0.3, 0), "c": Sample(99, 0.0, 1)}, now=2)
    balancer.observe({"a": Sample(9, 0.6, 1), "b": Sample(98, 0.3, 0), "c": Sample(99, 0.5, 1)}, now=3)
    assert balancer.plan(now=3) == [Move("c", 1, 0)]
    assert balancer.plan(now=1 + REST) == [Move("a", 1, 0)]
    assert balancer.moves == 1


def test_a_new_process_starts_from_nothing() -> None:
    """A successor's counter is its own: no load is known of it before its second sample."""
    balancer = observed((0.9, 0))
    balancer.observe({"a": Sample(1, 0.01, 0)}, now=2)
    assert balancer.snapshot(IDLE).workers == [WorkerLoad(vm="a", pid=1, core=0, share=0.0)]


def test_the_snapshot_has_imbalance_and_variance() -> None:
    """Of the cores' shares: 0.75 and 0.25 differ by a half, and lie a quarter from their mean."""
    snapshot = observed((0.75, 0), (0.25, 1)).snapshot(IDLE)
    assert snapshot.imbalance == pytest.approx(0.5) and snapshot.variance == pytest.approx(0.0625)
    assert [(core.core, core.workers) for core in snapshot.cores] == [(0, 1), (1, 1)]

"""Workers that are moved without being asked: what is uneven becomes even, and nothing is sent to and fro."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rayos_vmm.service.balance import (
    GAIN,
    LOOKS,
    PAUSE,
    PER_MINUTE,
    REST,
    START,
    Automatic,
    Balancer,
    Move,
    Sample,
)

PERIOD = 2.0
shares = st.lists(st.floats(0, 1), min_size=1, max_size=12)


class Host:
    """Workers with a processor time of their own each, and a balancer that looks at them."""

    def __init__(self, workers: int, cores: int) -> None:
        self.now = 0.0
        self.places = {f"vm{index}": 0 for index in range(workers)}
        self.used = dict.fromkeys(self.places, 0.0)
        self.pids = {vm: 100 + index for index, vm in enumerate(self.places)}
        self.balancer = Balancer(range(cores))
        self.automatic = Automatic(self.balancer, is_on=True)
        self.moves: list[tuple[float, Move]] = []

    def live(self, loads: list[float]) -> None:
        """A period in which each worker uses its share; then a look, and the move that comes of it."""
        self.now += PERIOD
        for vm, load in zip(self.places, loads, strict=True):
            self.used[vm] += load * PERIOD
        samples = {vm: Sample(self.pids[vm], self.used[vm], core) for vm, core in self.places.items()}
        self.balancer.observe(samples, now=self.now)
        move = self.automatic.check(now=self.now)
        if move is not None:
            assert self.places[move.vm] == move.source
            self.places[move.vm], self.used[move.vm] = move.target, 0.0
            self.pids[move.vm] += 1000
            self.automatic.moved(move, now=self.now)
            self.moves.append((self.now, move))

    def imbalance(self, loads: list[float]) -> float:
        cores = dict.fromkeys(self.balancer.cores, 0.0)
        for load, core in zip(loads, self.places.values(), strict=True):
            cores[core] += load
        return max(cores.values()) - min(cores.values())


@given(shares, st.integers(1, 4))
def test_a_steady_load_becomes_even_and_stays(loads: list[float], cores: int) -> None:
    """It ends, within as many moves as there are workers and a few, where no move is worth it; for good."""
    host = Host(len(loads), cores)
    for _ in range(200):
        host.live(loads)
    ended = len(host.moves)
    assert ended <= 2 * len(loads)
    assert host.imbalance(loads) < START or host.balancer.plan(now=host.now) == []
    for _ in range(100):
        host.live(loads)
    assert len(host.moves) == ended


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=120), st.integers(2, 3)
)
def test_no_load_makes_it_flap(history: list[list[float]], cores: int) -> None:
    """However loads swing: pauses between moves, so many a minute, rest for who was moved."""
    host = Host(4, cores)
    for loads in history:
        host.live(loads)
    times = [when for when, _ in host.moves]
    assert all(later - when >= PAUSE for when, later in pairwise(times))
    assert all(sum(when <= other < when + 60 for other in times) <= PER_MINUTE for when in times)
    for vm in host.places:
        own = [when for when, move in host.moves if move.vm == vm]
        assert all(later - when >= REST for when, later in pairwise(own))


def test_it_waits_for_a_lasting_imbalance_and_then_goes_on() -> None:
    """Not at once, not for a moment's load, not while it is off; below START only once it has begun."""
    host = Host(3, 2)
    host.live([0.9, 0.1, 0.1])
    for _ in range(10):
        host.live([0.2, 0.2, 0.05])
        host.live([0, 0, 0])
    assert host.moves == []
    host.automatic.is_on = False
    for _ in range(10):
        host.live([0.5, 0.4, 0.3])
    assert host.moves == []
    host.automatic.is_on = True
    for turn in range(LOOKS):
        assert len(host.moves) == 0, turn
        host.live([0.5, 0.4, 0.3])
    assert len(host.moves) == 1 and host.automatic.moves == host.balancer.moves == 1


def test_a_balance_below_the_threshold_is_left_alone() -> None:
    """Something that is worth a move when asked for is not, unasked, below START."""
    host = Host(2, 2)
    loads = [START / 2 - 0.01, START / 2 - 0.01]
    for _ in range(20):
        host.live(loads)
    assert START / 2 > GAIN and host.balancer.plan(now=host.now) != []
    assert host.moves == []


def test_a_move_that_has_to_wait_is_counted() -> None:
    """Two are to be moved; the second waits for the pause, and is made then."""
    host = Host(6, 4)
    loads = [0.9] * 6
    for _ in range(LOOKS + 1):
        host.live(loads)
    assert len(host.moves) == 1
    for _ in range(30):
        host.live(loads)
    assert host.automatic.held_back > 0 and len(host.moves) > 1
    told = host.automatic.snapshot()
    assert told.on and told.moves == len(host.moves) and told.held_back == host.automatic.held_back

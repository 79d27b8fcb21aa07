"""Who has which revision of the policy: deliveries to be made, acknowledged, repeated, given up. `now` in seconds.

Each target (a machine's device worker) is to have the newest revision. A delivery waits in the queue, is taken and
sent, and ends in one of three ways: the target acknowledges the revision that it applied, or it fails and waits twice
as long as before, or after ATTEMPTS it is a dead letter. A newer revision takes the place of an older one that waits; a
target is sent one at a time.

Invariant: a target that is attached and not a dead letter either has the newest revision, or has a delivery queued or
under way; `applied` never goes back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from rayos_vmm.policy.view import DeadLetter, DistributionView

QUEUE_MAXIMUM: Final = 512
ATTEMPTS: Final = 8
FIRST_DELAY_S: Final = 0.02
DELAY_MAXIMUM_S: Final = 2.0
#: A worker answers in microseconds; 2,000 new firewall rules take it tens of milliseconds, and its successor as long.
ANSWER_TIMEOUT_S: Final = 10.0
DEAD_MAXIMUM: Final = 512
_BROADCASTS_KEPT: Final = 256


@dataclass(slots=True)
class Target:
    """One worker: the revision that it should have, the one that it has, and the delivery in between."""

    name: str
    wanted: int
    applied: int = -1
    tries: int = 0
    under_way: int = -1  # the revision that was sent and not answered
    sent: float | None = None  # when
    is_dead: bool = False
    problem: str = ""

    @property
    def lag(self) -> int:
        """Revisions that it is behind; what has never acknowledged is behind all of them."""
        return self.wanted - max(self.applied, 0) if self.applied < self.wanted else 0


@dataclass(slots=True)
class Broadcast:
    """One revision on its way to all that were there when it was made."""

    revision: int
    began: float
    waiting: set[str]
    count: int
    latency_s: float | None = None


@dataclass(slots=True)
class Counters:
    """Since the service started."""

    broadcasts: int = 0
    deliveries: int = 0
    acknowledged: int = 0
    failed: int = 0
    dead: int = 0


@dataclass(slots=True)
class Distribution:
    """The targets by name."""

    revision: int = 0
    queue: dict[str, float] = field(default_factory=dict)  # by target, when to send
    targets: dict[str, Target] = field(default_factory=dict)
    dead: deque[DeadLetter] = field(default_factory=lambda: deque(maxlen=DEAD_MAXIMUM))
    counters: Counters = field(default_factory=Counters)
    broadcasts: deque[Broadcast] = field(default_factory=lambda: deque(maxlen=_BROADCASTS_KEPT))

    def attach(self, name: str, now: float) -> None:
        """A target comes, and is to have the newest revision whatever it had."""
        self.targets[name] = target = Target(name, self.revision)
        self._queue(target, now)

    def detach(self, name: str) -> None:
        """A target goes; nothing is owed to it any more."""
        self.queue.pop(name, None)
        if self.targets.pop(name, None) is not None:
            for broadcast in self.broadcasts:
                broadcast.waiting.discard(name)

    def announce(self, revision: int, now: float) -> None:
        """A revision is in force: every target is to have it, dead letters are tried again."""
        self.revision = revision
        self.counters.broadcasts += 1
        self.broadcasts.append(Broadcast(revision, now, set(self.targets), len(self.targets)))
        for target in self.targets.values():
            target.wanted = revision
            target.tries = 0
            target.is_dead = False
            self._queue(target, now)

    def renew(self, name: str, now: float) -> None:
        """A target has begun anew (its worker was replaced) and has to be told again."""
        target = self.targets.get(name)
        if target is not None:
            target.is_dead = False
            self._queue(target, now + FIRST_DELAY_S)

    def take(self, now: float) -> list[tuple[str, int]]:
        """Takes the deliveries to be sent now; each is under way from here on. Call `late` before."""
        taken = []
        for name, due in list(self.queue.items()):
            target = self.targets[name]
            if due <= now and target.sent is None:
                del self.queue[name]
                target.under_way, target.sent = target.wanted, now
                target.tries += 1
                self.counters.deliveries += 1
                taken.append((name, target.wanted))
        return taken

    def late(self, now: float) -> list[str]:
        """Ends deliveries that were not answered in time; the targets must not be able to answer them any more."""
        found = [
            target
            for target in self.targets.values()
            if target.sent is not None and now >= target.sent + ANSWER_TIMEOUT_S
        ]
        for target in found:
            self._fail(target, f"no answer within {ANSWER_TIMEOUT_S:g} s", now)
        return [target.name for target in found]

    def acknowledge(self, name: str, revision: int, now: float) -> None:
        """A target answers its delivery with the revision that it has applied."""
        target = self.targets.get(name)
        if target is None or target.sent is None:
            return
        if revision < target.under_way:
            self._fail(target, f"it has applied {revision}, not {target.under_way}", now)
            return
        target.sent = None
        target.applied = max(target.applied, revision)
        target.tries, target.problem = 0, ""
        self.counters.acknowledged += 1
        for broadcast in reversed(self.broadcasts):
            if broadcast.revision <= revision and name in broadcast.waiting:
                broadcast.waiting.discard(name)
                if not broadcast.waiting:
                    broadcast.latency_s = now - broadcast.began

    def fail(self, name: str, problem: str, now: float) -> None:
        """A delivery could not be made, or its answer is lost."""
        target = self.targets.get(name)
        if target is not None and target.sent is not None:
            self._fail(target, problem, now)

    def deadline(self) -> float | None:
        """When `late` or `take` has something to do, at the earliest."""
        times = [due for name, due in self.queue.items() if self.targets[name].sent is None]
        times += [
            target.sent + ANSWER_TIMEOUT_S for target in self.targets.values() if target.sent is not None
        ]
        return min(times, default=None)

    def lagging(self) -> list[str]:
        """The targets that have not applied the newest revision."""
        return sorted(target.name for target in self.targets.values() if target.lag)

    def view(self) -> DistributionView:
        """For callers: who lags, what was given up, how quick it was."""
        counters = self.counters
        ended = counters.acknowledged + counters.dead
        latencies = sorted(entry.latency_s for entry in self.broadcasts if entry.latency_s is not None)
        return DistributionView(
            revision=self.revision,
            targets=len(self.targets),
            lagging=self.lagging(),
            queue=len(self.queue),
            queue_maximum=QUEUE_MAXIMUM,
            broadcasts=counters.broadcasts,
            deliveries=counters.deliveries,
            acknowledged=counters.acknowledged,
            failed=counters.failed,
            success_rate=round(counters.acknowledged / ended, 4) if ended else None,
            dead_letters=list(self.dead),
            broadcast_median_ms=round(median(latencies) * 1000, 3) if latencies else None,
        )

    def _queue(self, target: Target, now: float) -> None:
        if target.name not in self.queue and len(self.queue) >= QUEUE_MAXIMUM:
            self._bury(target, f"{QUEUE_MAXIMUM} deliveries wait already", now)
        else:
            self.queue[target.name] = now

    def _fail(self, target: Target, problem: str, now: float) -> None:
        self.counters.failed += 1
        target.sent, target.problem = None, problem
        if target.name in self.queue:
            return  # a newer revision waits
        if target.tries >= ATTEMPTS:
            self._bury(target, problem, now)
        elif len(self.queue) >= QUEUE_MAXIMUM:
            self._bury(target, f"{problem}; {QUEUE_MAXIMUM} deliveries wait already", now)
        else:
            self.queue[target.name] = now + min(FIRST_DELAY_S * 2.0 ** (target.tries - 1), DELAY_MAXIMUM_S)

    def _bury(self, target: Target, problem: str, now: float) -> None:
        target.is_dead, target.problem = True, problem
        self.counters.dead += 1
        self.dead.append(DeadLetter(vm=target.name, revision=target.wanted, problem=problem, time=now))

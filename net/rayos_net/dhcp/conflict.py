"""Address conflict detection as a state machine without I/O (RFC 5227).

Theory of operation: `begin` before an address is used. Three probes go out at random distances; if nobody
answers until ANNOUNCE_WAIT after the last, the address is ours: two announcements. From then on `heard`
defends it once in DEFEND_INTERVAL; a second conflict within that time means that it is lost (2.4, b).

Invariant: a probe never has a sender address (it would poison the caches of the hosts that it asks), and our
own packets, seen again, are no conflict.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from rayos_net.dhcp.frame import Arp


@dataclass(frozen=True, slots=True)
class Times:
    """RFC 5227, 1.1, in seconds. A smaller set is for links where every host is virtual and answers in
    milliseconds.
    """

    probe_wait: float = 1.0
    probe_count: int = 3
    probe_min: float = 1.0
    probe_max: float = 2.0
    announce_wait: float = 2.0
    announce_count: int = 2
    announce_interval: float = 2.0
    defend_interval: float = 10.0
    max_conflicts: int = 10
    rate_limit_interval: float = 60.0


QUICK = Times(probe_wait=0.02, probe_min=0.05, probe_max=0.1, announce_wait=0.2, announce_interval=0.5)


class Phase(Enum):
    """The phase of the detector."""

    IDLE = "idle"
    PROBING = "probing"
    ANNOUNCING = "announcing"
    DEFENDING = "defending"


class Verdict(Enum):
    """The action that the caller must take."""

    NOTHING = "nothing"
    PROBE = "probe"  # send an ARP probe for the address
    ANNOUNCE = "announce"  # send an ARP announcement
    FREE = "free"  # nobody has it: use it (and announce)
    CONFLICT = "conflict"  # somebody else has it: do not use it (any more)


class Detector:
    """The detector for one address at a time. `uniform` gives a random number between its two arguments."""

    def __init__(
        self, hardware: bytes, uniform: Callable[[float, float], float], times: Times | None = None
    ) -> None:
        self.times = times or Times()
        self.phase = Phase.IDLE
        self.address = 0
        self._hardware = hardware
        self._uniform = uniform
        self._left = 0
        self._next: float | None = None
        self._defended = float("-inf")

    def begin(self, address: int, now: float) -> None:
        """Start to probe for `address`."""
        self.phase, self.address = Phase.PROBING, address
        self._left = self.times.probe_count
        self._next = now + self._uniform(0.0, self.times.probe_wait)
        self._defended = float("-inf")

    def skip(self, address: int, now: float) -> None:
        """Take `address` as ours without probing, and announce it."""
        self.phase, self.address = Phase.ANNOUNCING, address
        self._left = self.times.announce_count
        self._next = now
        self._defended = float("-inf")

    def stop(self) -> None:
        """The address is not used any more."""
        self.phase, self.address, self._next = Phase.IDLE, 0, None

    def deadline(self) -> float | None:
        """When `handle_timer` is due."""
        return self._next

    def handle_timer(self, now: float) -> Verdict:
        """Returns the actions that are due at `now`."""
        if self._next is None or now < self._next:
            return Verdict.NOTHING
        times = self.times
        if self.phase is Phase.PROBING:
            if self._left == 0:
                self.skip(self.address, now)
                return Verdict.FREE
            self._left -= 1
            self._next = now + (
                self._uniform(times.probe_min, times.probe_max) if self._left else times.announce_wait
            )
            return Verdict.PROBE
        self._left -= 1
        self._next = now + times.announce_interval if self._left else None
        self.phase = Phase.ANNOUNCING if self._left else Phase.DEFENDING
        return Verdict.ANNOUNCE

    def heard(self, arp: Arp, now: float) -> Verdict:
        """Judges the address by an ARP packet on the link."""
        if self.phase is Phase.IDLE or arp.sender_hardware == self._hardware:
            return Verdict.NOTHING
        if arp.sender == self.address:
            if self.phase is Phase.PROBING or now - self._defended < self.times.defend_interval:
                return Verdict.CONFLICT
            self._defended = now
            return Verdict.ANNOUNCE
        # Somebody probes for the same address at the same time (2.1.1).
        if self.phase is Phase.PROBING and arp.sender == 0 and arp.target == self.address:
            return Verdict.CONFLICT
        return Verdict.NOTHING

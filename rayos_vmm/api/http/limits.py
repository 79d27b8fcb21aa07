"""Limits on those who connect: how many at once, how long each may take, how much is logged of their faults.

Invariant: no caller can keep another one out. A user other than the owner holds at most `PER_USER` connections, and all
of them together at most `STRANGERS`; the owner has a count of his own.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

#: Connections of one user that is not the owner, of all these users together, and of the owner: with 64 machines he
#: follows 64 consoles and as many events.
PER_USER: Final = 16
STRANGERS: Final = 128
OWNER: Final = 1024
#: Seconds without a request, from a request's first byte to the end of its head, and of a body before its rate counts.
IDLE_S: Final = 60.0
HEAD_S: Final = 10.0
BODY_S: Final = 20.0
#: What a body has to come with from then on, bytes a second on average.
BODY_RATE: Final = 64 << 10
#: Seconds in which a stranger takes one piece of an answer; the owner may stop his terminal for as long as he likes.
SEND_S: Final = 30.0
#: Target and fields of a request: a token of 8 KiB and the longest path of a guest's file, percent-encoded.
HEAD_MAXIMUM_BYTES: Final = 32 << 10
_LOG_PERIOD_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that one connection is waited for."""

    idle_s: float = IDLE_S
    head_s: float = HEAD_S
    body_s: float = BODY_S
    send_s: float = SEND_S


STRANGER_DEADLINES: Final = Deadlines()
OWNER_DEADLINES: Final = Deadlines(send_s=math.inf)


class Lobby:
    """Counts the connections of each user (uid), and says who may not come in."""

    def __init__(self, owners: Collection[int]) -> None:
        self.owners = frozenset(owners)
        self._held: Counter[int] = Counter()

    @property
    def strangers(self) -> int:
        """Connections of users other than the owner."""
        return sum(count for uid, count in self._held.items() if uid not in self.owners)

    @property
    def own(self) -> int:
        """Connections of the owner, root among them."""
        return sum(self._held[uid] for uid in self.owners)

    def enter(self, uid: int) -> str:
        """Takes a connection in and returns ""; or says which limit it is beyond, and takes nothing."""
        if uid in self.owners:
            if self.own >= OWNER:
                return f"the owner has {OWNER} connections open already"
        elif self._held[uid] >= PER_USER:
            return f"user {uid} has {PER_USER} connections open already"
        elif self.strangers >= STRANGERS:
            return f"{STRANGERS} connections of users other than the owner are open already"
        self._held[uid] += 1
        return ""

    def leave(self, uid: int) -> None:
        """A connection that `enter` took in is over."""
        self._held[uid] -= 1
        if not self._held[uid]:
            del self._held[uid]


class Sparing:
    """Logs a sentence once a minute at most, with the number of times that it was left out since."""

    def __init__(self, log: logging.Logger, sentence: str) -> None:
        self._log = log
        self._sentence = sentence
        self._next = -math.inf
        self._left_out = 0

    def error(self, why: str, error: BaseException | None = None) -> None:
        """Tells it, unless it was told a moment ago."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        more: dict[str, Any] = {"exc_info": error} if error is not None else {}
        self._log.error("%s: %s (%d more since the last)", self._sentence, why, self._left_out, **more)
        self._next, self._left_out = now + _LOG_PERIOD_S, 0

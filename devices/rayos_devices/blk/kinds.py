"""Small numbers that the compiled block rings and the code around them share."""

from __future__ import annotations

from typing import Final

# What a request in flight is.
READ: Final = 0
WRITE: Final = 1
SYNC: Final = 2
FORMAT: Final = 3
#: Done elsewhere: only waits for its turn.
OVER: Final = 4

#: What `BlkRing.run` returns beside the head of a chain. It used up its budget: there may be more.
SPENT: Final = -2
#: It found the queue empty and asked for a kick.
IDLE: Final = -3
#: Its limits make it wait.
WAIT: Final = -4
#: As many requests are on their way as may be.
CROWDED: Final = -5

#: How long a queue is looked at after several requests, all of them over: the next ones are near then.
LINGER_NS: Final = 10_000

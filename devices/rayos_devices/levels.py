"""How much is done to be fast; each level adds to the one before. All of them check the same."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Level(IntEnum):
    """Switched while the guest runs; compiled rings are no part of any.

    They are chosen when `devices` is imported (`compiled.py`), once for all keepers; a worker and its successors are
    forks of a keeper, whose root is empty: it has no Python to start anew, and should not have. `RAYOS_PURE=1` is for
    the whole service.
    """

    #: Every operation is timed and kept, every frame is judged by the rules, every completion is told at once.
    CHECKED = 0
    #: Operations are sampled, and the verdict on a flow is remembered.
    REMEMBERING = 1
    #: Completions are told in batches, and a busy disk queue is looked at a moment longer.
    BATCHING = 2
    #: Work is looked for before sleeping.
    POLLING = 3


DEFAULT: Final = Level.BATCHING

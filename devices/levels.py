"""How much is done to be fast; each level adds to the one before. All of them check the same."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Level(IntEnum):
    """Switched while the guest runs. Whether the rings are compiled is decided when a worker starts (`compiled.py`)."""

    #: Every operation is timed and kept, every frame is judged by the rules, every completion is told at once.
    CHECKED = 0
    #: Operations are sampled, and the verdict on a flow is remembered.
    REMEMBERING = 1
    #: Completions are told in batches.
    BATCHING = 2
    #: Work is looked for before sleeping.
    POLLING = 3


DEFAULT: Final = Level.BATCHING

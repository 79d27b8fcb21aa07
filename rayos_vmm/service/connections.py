"""Counters of the API's connections, for the metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class ConnectionCounts:
    """Connections: open now, taken in ever, turned away by reason, and ended by an error of ours."""

    open: int = 0
    accepted: int = 0
    failed: int = 0
    refused: Counter[str] = field(default_factory=Counter)

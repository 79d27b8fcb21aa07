"""Counters of one device: per operation allowed, denied and bytes; denials by reason."""

from __future__ import annotations

from typing import Any

from devices.gate import Denial, Op


class OpCounter:
    """One operation kind. Plain attributes, so that a hot loop adds to them directly."""

    __slots__ = ("allowed", "bytes", "denied")

    def __init__(self) -> None:
        self.allowed = 0
        self.denied = 0
        self.bytes = 0


class Stats:
    """All counters of a device; `ops` holds a counter for each kind it was made with."""

    __slots__ = ("denials", "ops")

    def __init__(self, *ops: Op) -> None:
        self.ops: dict[Op, OpCounter] = {op: OpCounter() for op in ops}
        self.denials: dict[Denial, int] = {}

    def allow(self, op: Op, size_bytes: int = 0) -> None:
        counter = self.ops[op]
        counter.allowed += 1
        counter.bytes += size_bytes

    def deny(self, op: Op, reason: Denial) -> None:
        self.ops[op].denied += 1
        self.denials[reason] = self.denials.get(reason, 0) + 1

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready: operation -> allowed, denied, bytes; denials by reason."""
        return {
            "operations": {
                op.value: {"allowed": c.allowed, "denied": c.denied, "bytes": c.bytes}
                for op, c in self.ops.items()
            },
            "denials": {reason.value: count for reason, count in self.denials.items()},
        }

"""Records of events beside decisions: life cycles, operations refused by devices, typing."""

from __future__ import annotations

from contextlib import aclosing
from typing import Final

import trio

from rayos_vmm.events import EventLog
from rayos_vmm.policy.audit import Operation
from rayos_vmm.policy.audit_log import AuditLog

_INPUT_PERIOD_S: Final = 1.0


class AuditTrail:
    """Writes into `audit`; nothing here waits for the disk."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._typed: dict[tuple[str, int], int] = {}
        self._typing = trio.Event()

    def note_input(self, vm: str, port: int, count: int) -> None:
        """Somebody typed so many bytes into a console: recorded in sums, once a second, without the text."""
        self._typed[vm, port] = self._typed.get((vm, port), 0) + count
        self._typing.set()

    async def run(self, events: EventLog | None) -> None:
        """Records until it is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_input)
            if events is not None:
                nursery.start_soon(self._follow, events)

    async def _follow(self, events: EventLog) -> None:
        async with aclosing(events.follow(None)) as news:
            async for event in news:
                if event.type in ("vm.state", "vm.adopted"):
                    data = {"state": "adopted", **event.data}
                    self._audit.note(Operation.STATE, event.vm or "", **data)
                elif event.type == "devices.used":
                    self._audit.note(Operation.CHECK_PASS, event.vm or "", **event.data)
                elif event.type == "devices.denied":
                    self._audit.note(Operation.CHECK_FAIL, event.vm or "", allowed=False, **event.data)

    async def _tell_input(self) -> None:
        try:
            while True:
                await self._typing.wait()
                await trio.sleep(_INPUT_PERIOD_S)
                self._sum_up()
        finally:
            self._sum_up()

    def _sum_up(self) -> None:
        typed, self._typed, self._typing = self._typed, {}, trio.Event()
        for (vm, port), count in typed.items():
            self._audit.note(Operation.INPUT, vm, console=port, bytes=count)

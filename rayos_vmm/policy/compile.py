"""The policy as devices see it: one 64-bit word a machine, in the first bytes of its gate page; then the revision.

The page is a file of the machine's run directory, written by the service alone: a later service finds it there, and
a worker has it mapped for reading only, so that a worker taken over by its guest cannot widen it. One aligned store
changes every device's mind (x86-64: stores of eight aligned bytes are whole).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from rayos_vmm.policy.capability import Capability, mask, names
from rayos_vmm.policy.delegation import chain
from rayos_vmm.policy.grant import Moment
from rayos_vmm.policy.rulebook import RuleBook
from rayos_vmm.policy.table import Table
from rayos_vmm.shared.page import map_page
from rayos_vmm.worker.ceilings import (
    AUDITED,
    DISK_AT_ONCE,
    DISK_RATE,
    DISK_SIZE,
    GPU_MEMORY,
    INPUT_QUEUE,
    NET_RATE,
)

PAGE_NAME: Final = "gate.page"


class Words(msgspec.Struct, frozen=True):
    """A gate page. Rates in bytes a second, sizes in bytes, 0 for none beside the quota's; `audited` has a bit for each
    operation."""

    mask: int
    revision: int
    audited: int = 0
    net_rate: int = 0
    disk_rate: int = 0
    disk_size: int = 0
    gpu_memory: int = 0
    input_queue: int = 0
    disk_at_once: int = 0


class GatePage:
    """The page of one machine. `write` acts on the running devices at once."""

    def __init__(self, path: Path, *, is_new: bool) -> None:
        """Errors: OSError when there is none (and `is_new` is false)."""
        self._map = map_page(path, is_new=is_new)
        self._bytes = memoryview(self._map)
        self._word = self._bytes.cast("Q")

    @property
    def mask(self) -> int:
        """The operations that are allowed now."""
        return self._word[0]

    def write(self, words: Words) -> None:
        """The mask at once; the revision last: whoever sees it sees the others."""
        self._word[0] = words.mask
        self._word[AUDITED] = words.audited
        self._word[NET_RATE] = words.net_rate
        self._word[DISK_RATE] = words.disk_rate
        self._word[DISK_SIZE] = words.disk_size
        self._word[GPU_MEMORY] = words.gpu_memory
        self._word[INPUT_QUEUE] = words.input_queue
        self._word[DISK_AT_ONCE] = words.disk_at_once
        self._word[1] = words.revision

    def close(self) -> None:
        self._word.release()
        self._bytes.release()
        self._map.close()


def words(table: Table, book: RuleBook, vm: str) -> Words:
    """Returns the words of the gate page of `vm`: its rights, narrowed by the rules, and the least of its limits."""
    bounds = table.bounds(vm)
    limits = book.of(vm).bounds()
    rates = [rate for rate in (bounds.net, limits.get("net_rate")) if rate is not None]
    return Words(
        mask=mask(book.narrow(vm, table.holds(vm))),
        revision=book.revision,
        audited=bounds.audited,
        net_rate=min(rates, default=0) // 8,
        disk_rate=(bounds.disk or 0) // 8,
        disk_size=limits.get("disk", 0),
        gpu_memory=limits.get("gpu_memory", 0),
        input_queue=limits.get("input_queue", 0),
        disk_at_once=bounds.at_once or 0,
    )


def explain(table: Table, book: RuleBook, vm: str, now: Moment) -> list[dict[str, object]]:
    """For each right of `vm`, the chains of grants that it comes from (none where it lacks it), and the rule that takes
    it away.
    """
    own = [grant for grant in table.grants.values() if grant.holder == vm]
    return [
        {
            "capability": name,
            "allowed": Capability[name] in book.narrow(vm, table.holds(vm)),
            "denied_by": book.of(vm).taken.get(name),
            "from": [
                [link.view(now) for link in chain(table.grants, grant)]
                for grant in own
                if Capability[name] in grant.capabilities
            ],
        }
        for name in names(Capability(sum(Capability) & ~(Capability.CAP_AUDIT | Capability.CAP_ADMIN)))
    ]

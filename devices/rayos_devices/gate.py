"""The gate that a device asks before it acts: may this operation happen?

A device is given a `Gate` at construction and asks it once per operation, in this order: capability, quota, then (net)
firewall. A denial carries a reason from a closed list. `devices` knows no policy: the VMM hands in a page with a
compiled mask, so the answer costs one load and one AND, and changes in the moment the page is written.
"""

from __future__ import annotations

from array import array
from typing import Final

from rayos_devices.enums import IndexedEnum


class Op(IndexedEnum):
    """The kinds of operations that are gated and counted; `index` is the mask's bit."""

    GPU_ALLOC = "gpu.alloc"
    GPU_FREE = "gpu.free"
    GPU_RENDER = "gpu.render"
    GPU_READBACK = "gpu.readback"
    NET_TX = "net.tx"
    NET_RX = "net.rx"
    NET_CONFIG = "net.config"
    DISK_READ = "disk.read"
    DISK_WRITE = "disk.write"
    DISK_FLUSH = "disk.flush"
    DISK_FORMAT = "disk.format"
    INPUT_INJECT = "input.inject"
    INPUT_POLL = "input.poll"
    CONSOLE_WRITE = "console.write"
    CONSOLE_READ = "console.read"
    CONSOLE_RESIZE = "console.resize"
    RNG_READ = "rng.read"


class Denial(IndexedEnum):
    """Why an operation was refused; `index` is its counter."""

    CAPABILITY = "capability"
    QUOTA = "quota"
    FIREWALL = "firewall"
    QUEUE_FULL = "queue_full"
    RATE = "rate"
    READ_ONLY = "read_only"
    INVALID = "invalid"
    IO_ERROR = "io_error"


EVERYTHING: Final = (1 << len(Op)) - 1


class Gate:
    """A mask of allowed operations, bit `Op.index`, in the first word of `page` (shared, or private when None)."""

    def __init__(self, page: memoryview | None = None, *, allowed: int = EVERYTHING) -> None:
        self.mask = memoryview(array("Q", [allowed])) if page is None else page.cast("Q")

    def allows(self, index: int) -> bool:
        """Whether the operation with this index may happen."""
        return bool(self.mask[0] >> index & 1)

    def check(self, op: Op, size_bytes: int) -> Denial | None:
        """None when `op` on `size_bytes` may happen, else the reason."""
        return None if self.allows(op.index) else Denial.CAPABILITY


#: Everything may happen: a backend served alone, by its owner.
OPEN: Final = Gate()

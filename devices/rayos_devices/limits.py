"""Limits of a device that may be changed while its guest runs. A successor finds the values that were set in the
account.
"""

from __future__ import annotations

from typing import Final

from rayos_devices.enums import IndexedEnum


class Limit(IndexedEnum):
    """A bound of a device; `index` is its place in the account. 0 is unbounded, where a device can be."""

    #: Bytes a second: of a network card in each direction, of a disk together, of a console what the guest writes.
    RATE = "rate"
    #: Requests a second.
    OPERATIONS = "iops"
    #: Bytes of the host's storage.
    STORAGE = "storage"
    #: Bytes of the host's memory.
    MEMORY = "memory"
    #: Events that may wait for the guest.
    QUEUE = "queue"


#: No limit is above this; the account holds it with one more.
MAXIMUM: Final = 1 << 62

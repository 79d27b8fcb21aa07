"""The layout of virtqueues in numbers: the split one (VIRTIO 1.3, 2.7) and the packed one (2.8)."""

from __future__ import annotations

from typing import Final

DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
AVAIL_F_NO_INTERRUPT: Final = 1

#: 2.8.1, beside those above; bits 7 and 15.
DESC_F_AVAIL: Final = 0x80
DESC_F_USED: Final = 0x8000
#: 2.8.10, flags of an event suppression structure; 0 is: tell of everything.
EVENT_DISABLE: Final = 1
EVENT_DESC: Final = 2
EVENT_BYTES: Final = 4
#: 2.8.1: both positions at the first descriptor, both wrap counters 1.
PACKED_START: Final = 0x80008000

DESCRIPTOR_BYTES: Final = 16
AVAIL_HEADER_BYTES: Final = 4
USED_HEADER_BYTES: Final = 4
USED_ELEMENT_BYTES: Final = 8

#: VIRTIO 1.3, 2.7: at most 32768; QEMU never makes a queue longer than 1024 (VIRTQUEUE_MAX_SIZE).
MAX_QUEUE_SIZE: Final = 1024
#: Bytes one chain may describe: beyond 4 GiB a u32 used length cannot say what was written.
MAX_CHAIN_BYTES: Final = 0xFFFFFFFF

#: Buffers of one vectored system call of the data path: SEG_MAX of virtio-blk and more than a 64 KiB frame takes.
MAX_BUFFERS: Final = 160

#: `take` found nothing.
NOTHING: Final = -1


def descriptor_table_bytes(size: int) -> int:
    return DESCRIPTOR_BYTES * size


def avail_ring_bytes(size: int) -> int:
    return AVAIL_HEADER_BYTES + 2 * size + 2


def used_ring_bytes(size: int) -> int:
    return USED_HEADER_BYTES + USED_ELEMENT_BYTES * size + 2

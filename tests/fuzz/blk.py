"""Fuzz target: block requests off a ring, over memory of any content.

Input: flags u8, pad 3, then guest memory from its start as for the vring target. The oracle: nothing escapes but a
latched queue; the image keeps its size; a read-only image keeps its bytes; no more requests than the budget allows.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from rayos_devices.blk.backend import BlkBackend
from rayos_devices.blk.store import RawStore
from rayos_devices.errors import QueueError
from rayos_devices.loop import Loop
from rayos_devices.virtio.memory import GuestMemory
from tests.framework.guest_memory import GuestRam
from tests.fuzz.engine import MAX_BYTES, main
from tests.fuzz.vring import AVAIL, RAM_BYTES, SIZE, TABLE, USED

DISK_BYTES: Final = 64 << 10
_ram = GuestRam(RAM_BYTES, guest_address=0)
_memory = GuestMemory()
_memory.replace([_ram.spec], [_ram.fd])
_loop = Loop()
_zeros = bytes(RAM_BYTES)


def _disk(*, read_only: bool) -> BlkBackend:
    fd = os.memfd_create("disk", os.MFD_CLOEXEC)
    os.pwrite(fd, b"\x5a" * DISK_BYTES, 0)
    return BlkBackend("blk", _loop, RawStore(fd, read_only=read_only), serial="fuzz")


_disks: Final = (_disk(read_only=False), _disk(read_only=True))


def run(data: bytes) -> None:
    """Raises AssertionError, or whatever escaped, for a bug."""
    flags = data[0] if data else 0
    image = data[4 : 4 + MAX_BYTES]
    _ram.view[:] = _zeros
    _ram.view[: len(image)] = image
    disk = _disks[flags & 1]
    disk.set_features(0 if flags & 2 else disk.features)
    vring = disk.queues[0]
    vring.attach(
        _memory,
        SIZE,
        _memory.view(TABLE, 16 * SIZE),
        _memory.view(AVAIL, 6 + 2 * SIZE),
        _memory.view(USED, 6 + 8 * SIZE),
        base=0,
        event_idx=bool(flags & 4),
        indirect=True,
    )
    requests = vring.requests
    try:
        for _ in range(2):
            if not disk.process(0):
                break
        assert vring.requests - requests <= 2 * disk.BUDGET
    except QueueError:
        assert vring.broken
    finally:
        disk.stop_queue(0)
        vring.stop()
    assert os.fstat(disk.store.fd).st_size == DISK_BYTES
    if flags & 1:
        assert os.pread(disk.store.fd, 4096, 0) == b"\x5a" * 4096, "a read-only image was written"


def seeds() -> dict[str, bytes]:
    """Every request type, as Linux lays it out, and odd shapes."""

    def request(
        kind: int, sector: int, *lengths: tuple[int, int], payload: bytes = b"", flags: int = 4
    ) -> bytes:
        memory = bytearray(2048)
        memory[512:528] = struct.pack("<IIQ", kind, 0, sector)
        memory[528 : 528 + len(payload)] = payload
        at = 512
        for index, (length, kind_flags) in enumerate(lengths):
            last = index + 1 == len(lengths)
            struct.pack_into(
                "<QIHH", memory, 16 * index, at, length, kind_flags | (not last), 0 if last else index + 1
            )
            at += length
        struct.pack_into("<HHH", memory, AVAIL, 0, 1, 0)
        return bytes([flags, 0, 0, 0]) + bytes(memory)

    segment = struct.pack("<QII", 0, 8, 0)
    return {
        "read": request(0, 3, (16, 0), (512, 2), (1, 2)),
        "read split": request(0, 3, (16, 0), (100, 2), (412, 2), (1, 2)),
        "write": request(1, 3, (16, 0), (512, 0), (1, 2)),
        "write read only": request(1, 3, (16, 0), (512, 0), (1, 2), flags=5),
        "header and data": request(1, 3, (528, 0), (1, 2)),
        "data and status": request(0, 3, (16, 0), (513, 2)),
        "flush": request(4, 0, (16, 0), (1, 2)),
        "id": request(8, 0, (16, 0), (20, 2), (1, 2)),
        "discard": request(11, 0, (16, 0), (16, 0), (1, 2), payload=segment),
        "write zeroes": request(13, 0, (16, 0), (32, 0), (1, 2), payload=segment * 2),
        "not negotiated": request(11, 0, (16, 0), (16, 0), (1, 2), payload=segment, flags=6),
        "unknown": request(99, 0, (16, 0), (1, 2)),
        "beyond": request(0, 1 << 55, (16, 0), (512, 2), (1, 2)),
        "short": request(0, 0, (8, 0), (1, 2)),
        "no status": request(1, 0, (16, 0), (512, 0)),
        "bytes": request(0, 0, *[(2, 0)] * 6, (4, 0), (513, 2)),
    }


if __name__ == "__main__":
    main("blk", run)

"""Fuzz target: a vring over memory of any content.

Input: base u16, flags u8, pad, then guest memory from its start: descriptor table, avail ring, used ring, tables and
buffers.
The oracle: only QueueError; views inside memory; a head in flight at most once; steps bounded by what was offered.
"""

from __future__ import annotations

import struct
from typing import Final

from rayos_devices.errors import QueueError
from rayos_devices.virtio.memory import GuestMemory
from rayos_devices.virtio.vring import Vring
from tests.framework.guest_memory import GuestRam
from tests.fuzz.engine import MAX_BYTES, main

SIZE: Final = 8
RAM_BYTES: Final = 8192
#: Guest addresses: the table, the two rings, and free room behind them.
TABLE, AVAIL, USED, ROOM = 0, 128, 152, 256

_ram = GuestRam(RAM_BYTES, guest_address=0)
_memory = GuestMemory()
_memory.replace([_ram.spec], [_ram.fd])
_vring = Vring(0)
_zeros = bytes(RAM_BYTES)


def run(data: bytes) -> None:
    """Raises AssertionError, or whatever escaped, for a bug."""
    base, flags = struct.unpack("<HB", data[:3].ljust(3, b"\0"))
    image = data[4 : 4 + MAX_BYTES]
    _ram.view[:] = _zeros
    _ram.view[: len(image)] = image
    vring = _vring
    vring.attach(
        _memory,
        SIZE,
        _memory.view(TABLE, 16 * SIZE),
        _memory.view(AVAIL, 6 + 2 * SIZE),
        _memory.view(USED, 6 + 8 * SIZE),
        base=base,
        resumed=bool(flags & 4),
        event_idx=bool(flags & 1),
        indirect=bool(flags & 2),
    )
    flying: list[int] = []
    popped = 0
    try:
        while popped < 4 * SIZE and (chain := vring.pop()) is not None:
            popped += 1
            assert chain.head < SIZE and chain.head not in flying, "a head twice in flight"
            flying.append(chain.head)
            assert sum(map(len, chain.readable)) == chain.readable_bytes <= 0xFFFFFFFF
            assert sum(map(len, chain.writable)) == chain.writable_bytes <= 0xFFFFFFFF
            if chain.readable:
                chain.read(min(chain.readable_bytes, 64))
            if flags & 8 and chain.writable:
                chain.write(b"\xa5" * 16)
            if flags & 16:
                before = vring.next_used_index
                vring.push(flying.pop(0), 1)
                vring.publish()
                assert vring.used_index == (before + 1) & 0xFFFF
        if not flags & 24:
            assert popped <= SIZE, "more chains than the queue holds"
    except QueueError:
        assert vring.broken
        assert vring.pop() is None and not vring.arm()
    finally:
        vring.stop()


def seeds() -> dict[str, bytes]:
    """One sound ring, and one for each way of breaking it."""

    def image(
        *descriptors: tuple[int, int, int, int],
        heads: tuple[int, ...] = (0,),
        flags: int = 3,
        extra: tuple[int, bytes] = (0, b""),
    ) -> bytes:
        memory = bytearray(1024)
        for index, descriptor in enumerate(descriptors):
            struct.pack_into("<QIHH", memory, 16 * index, *descriptor)
        struct.pack_into(f"<HH{len(heads)}H", memory, AVAIL, 0, len(heads), *heads)
        at, value = extra
        if value:
            memory[at : at + len(value)] = value
        return struct.pack("<HBx", 0, flags) + bytes(memory)

    entry = struct.Struct("<QIHH").pack
    return {
        "sound": image((256, 16, 1, 1), (512, 64, 3, 2), (600, 1, 2, 0), flags=3 | 8 | 16),
        "many": image(*[(256 + 16 * n, 16, 2, 0) for n in range(8)], heads=tuple(range(8)), flags=31),
        "indirect": image((256, 32, 4, 0), extra=(256, entry(400, 16, 1, 1) + entry(420, 16, 2, 0))),
        "loop": image((256, 1, 1, 0)),
        "cycle": image((256, 1, 1, 1), (256, 1, 1, 0)),
        "outside": image((1 << 40, 16, 0, 0)),
        "wraps": image(((1 << 64) - 8, 16, 2, 0)),
        "long": image((256, 0xFFFFFFFF, 2, 0)),
        "backwards": image((256, 4, 3, 1), (300, 4, 0, 0)),
        "nested": image((256, 16, 4, 0), extra=(256, entry(256, 16, 4, 0))),
        "odd": image((256, 17, 4, 0)),
        "head": image(heads=(8,)),
        "next": image((256, 1, 1, 8)),
        "twice": image((256, 1, 2, 0), heads=(0, 0)),
        "resumed": image((256, 1, 2, 0), heads=(0, 0, 0), flags=4 | 16, extra=(154, b"\2\0")),
        "on itself": image((0, 256, 2, 0), (TABLE, 128, 2, 0), (AVAIL, 22, 2, 0), heads=(0, 1, 2), flags=31),
    }


if __name__ == "__main__":
    main("vring", run)

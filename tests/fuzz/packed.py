"""Fuzz target: a packed ring over memory of any content.

Input: base u32, flags u8, then guest memory from its start: descriptors, both event suppressions, tables and buffers.
The oracle: only QueueError; views inside memory; a head in flight at most once; steps bounded by the ring and what
is completed; a successor finds the count and the position.
"""

from __future__ import annotations

import struct
from array import array
from typing import Final

from rayos_devices.errors import QueueError
from rayos_devices.virtio.layout import PACKED_START
from rayos_devices.virtio.memory import GuestMemory
from rayos_devices.virtio.packed import JOURNAL_WORDS, is_packed_base
from rayos_devices.virtio.vring import Vring
from tests.framework.guest_memory import GuestRam
from tests.fuzz.engine import MAX_BYTES, main

SIZE: Final = 8
RAM_BYTES: Final = 8192
#: Guest addresses: the ring, what the driver and the device want to hear, and free room behind them.
RING, DRIVER, DEVICE, ROOM = 0, 128, 132, 256
HEADER: Final = struct.Struct("<IB")

_ram = GuestRam(RAM_BYTES, guest_address=0)
_memory = GuestMemory()
_memory.replace([_ram.spec], [_ram.fd])
_vring = Vring(0)
_vring.journal = memoryview(array("Q", bytes(8 * JOURNAL_WORDS)))
_zeros = bytes(RAM_BYTES)


def attach(base: int, flags: int, *, resumed: bool) -> None:
    areas = (RING, 16 * SIZE), (DRIVER, 4), (DEVICE, 4)
    _vring.attach(
        _memory,
        SIZE,
        *(_memory.view(*area) for area in areas),
        base=base,
        resumed=resumed,
        packed=True,
        event_idx=bool(flags & 1),
        indirect=bool(flags & 2),
    )


def run(data: bytes) -> None:
    """Raises AssertionError, or whatever escaped, for a bug."""
    base, flags = HEADER.unpack(data[: HEADER.size].ljust(HEADER.size, b"\0"))
    image = data[HEADER.size : HEADER.size + MAX_BYTES]
    _ram.view[:] = _zeros
    _ram.view[: len(image)] = image
    vring = _vring
    attach(base if is_packed_base(base, SIZE) else PACKED_START, flags, resumed=False)
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
            if flags & 32:
                vring.unpop(flying.pop())
                again = vring.take()
                assert flags & 8 or again == chain.head
                if again < 0:
                    break
                flying.append(again)
            if flags & 16:
                before = vring.next_used_index
                vring.push(flying.pop(0), 1)
                vring.arm()
                vring.publish()
                assert vring.used_index == (before + 1) & 0xFFFF
        if not flags & 24:
            assert popped <= SIZE, "more chains than the queue holds"
    except QueueError:
        assert vring.broken
        assert vring.pop() is None and not vring.arm()
    finally:
        count, place = vring.used_index, vring.stop() >> 16
    if vring.journal[0] >> 16 & 0xFFFF == 0:
        attach(base, flags, resumed=True)
        assert vring.used_index == count
        assert vring.stop() == place * 0x10001


def seeds() -> dict[str, bytes]:
    """One sound ring, and one for each way of breaking it."""

    def image(
        *descriptors: tuple[int, int, int, int],
        flags: int = 3,
        base: int = PACKED_START,
        events: tuple[int, int] = (0, 0),
        extra: tuple[int, bytes] = (0, b""),
    ) -> bytes:
        memory = bytearray(1024)
        for index, descriptor in enumerate(descriptors):
            struct.pack_into("<QIHH", memory, 16 * index, *descriptor)
        struct.pack_into("<II", memory, DRIVER, *events)
        at, value = extra
        if value:
            memory[at : at + len(value)] = value
        return HEADER.pack(base, flags) + bytes(memory)

    entry = struct.Struct("<QIHH").pack
    available, used = 0x80, 0x8080
    return {
        "sound": image((256, 16, 0, 0x81), (512, 64, 0, 0x83), (600, 1, 7, 0x82), flags=3 | 8 | 16),
        "many": image(*[(256 + 16 * n, 16, n, 0x82) for n in range(8)], flags=31),
        "put back": image(*[(256 + 16 * n, 16, n, 0x82) for n in range(8)], flags=3 | 32 | 16),
        "across": image(
            *[(256, 16, 1, 0x8003)] * 2,
            (256, 1, 9, 0x8002),
            *[(256, 16, 0, 0x81)] * 5,
            base=0x80068006,
            flags=19,
        ),
        "indirect": image((256, 32, 3, 0x84), extra=(256, entry(400, 16, 0, 0) + entry(420, 16, 0, 2))),
        "used": image(*[(256, 16, 3, used)] * 8),
        "all of it": image(*[(256, 1, 0, 0x81)] * 8),
        "overtaken": image(*[(256, 1, 0, 0x82)] * 7, (256, 1, 0, 0x80), base=0x80000000),
        "outside": image((1 << 40, 16, 0, available)),
        "wraps": image(((1 << 64) - 8, 16, 0, 0x82)),
        "long": image((256, 0xFFFFFFFF, 0, 0x82)),
        "backwards": image((256, 4, 0, 0x83), (300, 4, 0, available)),
        "nested": image((256, 16, 0, 0x84), extra=(256, entry(256, 16, 0, 4))),
        "odd": image((256, 17, 0, 0x84)),
        "behind a direct one": image((256, 1, 0, 0x81), (256, 16, 0, 0x84)),
        "with next": image((256, 16, 0, 0x85)),
        "any id": image((256, 1, 0xFFFF, 0x82), (256, 1, 0xFFFF, 0x82), flags=19),
        "event beyond": image(*[(256, 1, 0, 0x82)] * 8, flags=19, events=(0x2FFFF, 0xFFFFFFFF)),
        "on itself": image((RING, 132, 0, 0x82), (DRIVER, 8, 0, 0x82), (256, 1, 0, 0x82), flags=31),
    }


if __name__ == "__main__":
    main("packed", run)

"""Fuzz target: vhost-user messages into a session.

Input: messages one after the other, each a byte that says how many descriptors of which kind come with it, then header
and payload. The oracle: only ProtocolError; every descriptor closed; a value packs to what it was unpacked from.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from rayos_devices.errors import ProtocolError
from rayos_devices.loop import Loop
from rayos_devices.vhost_user.message import (
    HEADER,
    MEMORY_HEADER,
    U64,
    VRING_STATE,
    ConfigAccess,
    FrontendRequest,
    Header,
    Message,
    VringAddress,
    pack_region,
)
from rayos_devices.vhost_user.session import Session
from rayos_devices.virtio.memory import RegionSpec
from tests.framework.echo import EchoBackend
from tests.framework.guest_memory import USER_BASE, GuestRam
from tests.fuzz.engine import main

_ram = GuestRam(1 << 16, guest_address=0)
_event = os.eventfd(0, os.EFD_NONBLOCK)
_KINDS: Final = (_event, _ram.fd, 0, _event)
_loop = Loop()
_backend = EchoBackend(_loop)


def run(data: bytes) -> None:
    """Raises AssertionError, or whatever escaped, for a bug."""
    probe = os.dup(_event)
    os.close(probe)
    session = Session(_backend, _loop)
    brought: list[int] = []
    try:
        while len(data) > HEADER.size:
            extra, data = data[0], data[1:]
            header = Header.unpack(data[: HEADER.size])
            payload = data[HEADER.size : HEADER.size + header.size]
            data = data[HEADER.size + header.size :]
            if len(payload) < header.size:
                break
            count = extra & 3
            header.check_fds(count)
            message = Message(
                header.request, header.flags, payload, [os.dup(_KINDS[extra >> 2 & 3]) for _ in range(count)]
            )
            brought += message.fds
            check_codec(header.request, payload)
            session.handle(message)
            assert message.fds == [], "a message kept a descriptor"
            _loop.step(0)
    except ProtocolError as error:
        assert str(error)
    finally:
        session.close()
    assert not any(queue.attached for queue in _backend.queues)
    # Descriptor numbers are given out lowest first: if all were closed, the next one is the same as before.
    again = os.dup(_event)
    os.close(again)
    assert again == probe, f"descriptors were left open: {brought}"


def check_codec(request: FrontendRequest, payload: bytes) -> None:
    match request:
        case FrontendRequest.SET_VRING_ADDR:
            address = VringAddress.unpack(payload)
            assert VringAddress.unpack(address.pack()) == address
        case FrontendRequest.GET_CONFIG | FrontendRequest.SET_CONFIG:
            assert ConfigAccess.unpack(payload).pack() == payload


def seeds() -> dict[str, bytes]:
    """A session as QEMU opens it, and pieces of it."""

    def message(request: FrontendRequest, payload: bytes = b"", extra: int = 0, flags: int = 1) -> bytes:
        return bytes([extra]) + HEADER.pack(request, flags, len(payload)) + payload

    event, ram = 1, 1 | 1 << 2
    region = RegionSpec(0, 1 << 16, USER_BASE, 0)
    negotiate = [
        message(FrontendRequest.GET_FEATURES),
        message(FrontendRequest.GET_PROTOCOL_FEATURES),
        message(FrontendRequest.SET_PROTOCOL_FEATURES, U64.pack(0xFFFF)),
        message(FrontendRequest.GET_QUEUE_NUM),
        message(FrontendRequest.SET_OWNER, flags=9),
        message(FrontendRequest.SET_FEATURES, U64.pack(1 << 32 | 1 << 30 | 1 << 29)),
    ]
    table = message(FrontendRequest.SET_MEM_TABLE, MEMORY_HEADER.pack(1, 0) + pack_region(region), ram)
    address = VringAddress(0, 0, USER_BASE, USER_BASE + 512, USER_BASE + 256).pack()
    start = [
        message(FrontendRequest.SET_VRING_NUM, VRING_STATE.pack(0, 8)),
        message(FrontendRequest.SET_VRING_BASE, VRING_STATE.pack(0, 0)),
        message(FrontendRequest.SET_VRING_ADDR, address),
        message(FrontendRequest.SET_VRING_CALL, U64.pack(0), event),
        message(FrontendRequest.SET_VRING_ERR, U64.pack(0), event),
        message(FrontendRequest.SET_VRING_KICK, U64.pack(0), event),
        message(FrontendRequest.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)),
    ]
    stop = message(FrontendRequest.GET_VRING_BASE, VRING_STATE.pack(0, 0))
    more = bytes(8) + pack_region(RegionSpec(1 << 20, 4096, 1 << 40, 0))
    return {
        "session": b"".join([*negotiate, table, *start, stop]),
        "twice": b"".join([*negotiate, table, *start, stop, table, *start, table]),
        "slots": b"".join(
            [
                table,
                *start,
                message(FrontendRequest.ADD_MEM_REG, more, ram),
                message(FrontendRequest.REM_MEM_REG, more),
            ]
        ),
        "config": message(FrontendRequest.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8))
        + message(FrontendRequest.SET_CONFIG, struct.pack("<III", 1, 4, 0) + b"abcd"),
        "no descriptor": message(FrontendRequest.SET_VRING_CALL, U64.pack(1 << 8))
        + message(FrontendRequest.SET_VRING_KICK, U64.pack(1 << 8)),
        "gpu": message(FrontendRequest.GPU_SET_SOCKET, extra=event),
        "reset": b"".join([table, *start, message(FrontendRequest.RESET_OWNER), *start]),
    }


if __name__ == "__main__":
    main("message", run)

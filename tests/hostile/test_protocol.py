"""A frontend that was taken over: vhost-user messages that break the protocol (rows U1 to U9 of the threat model).

Every one ends in class P: what came is closed, the session is dropped, the backend listens again.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayos_devices.backend import Backend
from rayos_devices.vhost_user.message import (
    HEADER,
    MEMORY_HEADER,
    U64,
    VRING_STATE,
    FrontendRequest,
    pack_region,
    pack_request,
)
from rayos_devices.virtio.memory import MAX_REGIONS, RegionSpec
from tests.framework.frontend import Dropped, pack_address
from tests.framework.guest_memory import F_ADD_SEALS, GuestRam
from tests.framework.hostile import DEVICES, Device, Idle
from tests.framework.target import Rig, Served, Stepped

#: vhost-user requests that exist but are not spoken here.
GET_INFLIGHT_FD = 31
SET_INFLIGHT_FD = 32

Target = Stepped[Backend] | Served

PLACES = [
    (DEVICES["echo"], "stepped"),
    *((device, "served") for device in DEVICES.values() if device.name != "echo"),
]


def name(value: object) -> str:
    return str(getattr(value, "name", value))


on_every_device = pytest.mark.parametrize(("device", "where"), PLACES, ids=name)
on_two = pytest.mark.parametrize(("device", "where"), [PLACES[0], (DEVICES["blk"], "served")], ids=name)


def assert_unhurt(device: Device, target: Target, idle: Idle) -> None:
    """The next frontend is served, and nothing is left open."""
    with Rig(target, device.queues) as rig:
        device.honest(rig)
    idle.check()


def refused(device: Device, target: Target, data: bytes, fds: list[int] | None = None) -> None:
    """Send bytes in a running session: it is dropped, and nothing else happens."""
    before = Idle(target)
    with Rig(target, device.queues) as rig:
        rig.frontend.send_raw(data, fds or [])
        assert rig.frontend.is_dropped()
    assert_unhurt(device, target, before)


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


# -- U1: no message --------------------------------------------------------------------------------------------------

NO_MESSAGES = {
    "payload above the largest": HEADER.pack(FrontendRequest.SET_FEATURES, 1, 4097) + bytes(4097),
    "payload of 4 GiB": HEADER.pack(FrontendRequest.SET_MEM_TABLE, 1, 0xFFFFFFFF),
    "payload too short": HEADER.pack(FrontendRequest.SET_FEATURES, 1, 7) + bytes(7),
    "payload too long": HEADER.pack(FrontendRequest.SET_FEATURES, 1, 9) + bytes(9),
    "payload where there is none": HEADER.pack(FrontendRequest.GET_FEATURES, 1, 8) + bytes(8),
    "request 0": HEADER.pack(0, 1, 0),
    "request that is not spoken": HEADER.pack(22, 1, 8) + bytes(8),
    "request beyond the last": HEADER.pack(1000, 1, 0),
    "request 2^32-1": HEADER.pack(0xFFFFFFFF, 1, 0),
    "version 0": HEADER.pack(FrontendRequest.GET_FEATURES, 0, 0),
    "version 2": HEADER.pack(FrontendRequest.GET_FEATURES, 2, 0),
    "version 3": HEADER.pack(FrontendRequest.GET_FEATURES, 3, 0),
    "a reply": HEADER.pack(FrontendRequest.GET_FEATURES, 5, 0),
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
    "a status of two bytes": pack_request(FrontendRequest.SET_STATUS, U64.pack(0x100)),
    "a channel without its socket": pack_request(FrontendRequest.SET_BACKEND_REQ_FD),
    "config size unlike its data": pack_request(
        FrontendRequest.SET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(4)
    ),
}
#: A configuration that cannot be read is an empty answer, and the session goes on (vhost-user, GET_CONFIG).
NO_CONFIGS = {
    "config beyond the end": pack_request(
        FrontendRequest.GET_CONFIG, struct.pack("<III", 250, 8, 0) + bytes(8)
    ),
    "config offset wraps": pack_request(
        FrontendRequest.GET_CONFIG, struct.pack("<III", 0xFFFFFFFF, 2, 0) + bytes(2)
    ),
}


@on_every_device
@pytest.mark.parametrize("case", NO_MESSAGES)
def test_U1_what_is_no_message_ends_the_session(device: Device, target: Target, case: str) -> None:
    """Size, version, number: refused at the header, before anything is allocated for it."""
    refused(device, target, NO_MESSAGES[case])


@on_every_device
@pytest.mark.parametrize("case", NO_CONFIGS)
def test_U1_a_configuration_that_cannot_be_read(device: Device, target: Target, case: str) -> None:
    """Answered without a byte of it."""
    before = Idle(target)
    with Rig(target, device.queues) as rig:
        rig.frontend.send_raw(NO_CONFIGS[case])
        request, _, payload = rig.frontend.receive()
        assert (request, payload) == (FrontendRequest.GET_CONFIG, b"")
        device.honest(rig)
    assert_unhurt(device, target, before)


@on_every_device
@pytest.mark.parametrize("cut", [1, 11, 12, 13, 19])
def test_U1_a_message_cut_short_by_the_end(device: Device, target: Target, cut: int) -> None:
    """The frontend left in the middle of a message."""
    before = Idle(target)
    with Rig(target, device.queues) as rig:
        rig.frontend.send_raw(pack_request(FrontendRequest.SET_FEATURES, bytes(8))[:cut])
    assert_unhurt(device, target, before)


# -- U2: descriptors -------------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize(
    ("request_", "payload", "count"),
    [
        (FrontendRequest.GET_FEATURES, b"", 1),
        (FrontendRequest.SET_OWNER, b"", 3),
        (FrontendRequest.SET_BACKEND_REQ_FD, b"", 1),
        (FrontendRequest.SET_BACKEND_REQ_FD, b"", 2),
        (FrontendRequest.RESET_DEVICE, b"", 1),
        (FrontendRequest.SET_VRING_NUM, VRING_STATE.pack(0, 64), 1),
        (FrontendRequest.SET_VRING_KICK, U64.pack(0), 2),
        (FrontendRequest.SET_VRING_CALL, U64.pack(0), MAX_REGIONS),
        (FrontendRequest.SET_MEM_TABLE, MEMORY_HEADER.pack(0, 0), MAX_REGIONS + 1),
        (FrontendRequest.SET_MEM_TABLE, MEMORY_HEADER.pack(0, 0), 253),
        (FrontendRequest.SET_MEM_TABLE, MEMORY_HEADER.pack(0, 0), 2),
    ],
    ids=lambda value: (
        value.name if isinstance(value, FrontendRequest) else (value if isinstance(value, int) else "")
    ),
)
def test_U2_descriptors_that_a_message_may_not_bring(
    device: Device, target: Target, event: int, request_: FrontendRequest, payload: bytes, count: int
) -> None:
    """All of them are closed."""
    refused(device, target, pack_request(request_, payload), [event] * count)


@on_two
def test_U2_ten_thousand_messages_with_descriptors_leave_none(
    device: Device, target: Target, event: int
) -> None:
    """CVE-2019-14818. Whole messages, broken ones, and halves that the end cuts off."""
    before = Idle(target)
    tries = 0
    while tries < 10_000:
        with target.connect() as frontend:
            try:
                for _ in range(100):
                    frontend.tell(FrontendRequest.SET_VRING_CALL, U64.pack(0), [event])
                    tries += 1
                match tries // 100 % 3:
                    case 0:
                        frontend.send(FrontendRequest.GET_FEATURES, fds=[event] * 8)
                    case 1:
                        frontend.send_raw(HEADER.pack(FrontendRequest.SET_MEM_TABLE, 1, 40)[:7], [event] * 32)
                    case _:
                        frontend.send(FrontendRequest.SET_VRING_KICK, U64.pack(99), [event])
            except Dropped:
                pass
    assert_unhurt(device, target, before)


# -- U3, U9: the inflight region -------------------------------------------------------------------------------------


@on_every_device
def test_U3_the_inflight_region_is_not_offered(device: Device, target: Target) -> None:
    """Asked for over and over (CVE-2020-10726), it is class P each time and nothing grows."""
    for _ in range(20):
        refused(device, target, HEADER.pack(GET_INFLIGHT_FD, 1, 24) + struct.pack("<QQHH4x", 0, 0, 1, 64))


@on_every_device
def test_U9_an_inflight_region_of_the_frontends_is_not_taken(device: Device, target: Target) -> None:
    """Whatever it holds: positions come from the rings, and nothing of it is ever mapped."""
    with GuestRam(4096) as region:
        region.view[:] = b"\xff" * 4096
        payload = struct.pack("<QQHH4x", 4096, 0, 0xFFFF, 0xFFFF)
        refused(device, target, HEADER.pack(SET_INFLIGHT_FD, 1, 24) + payload, [region.fd])


# -- U4: queue indices -----------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("index", ["the count", 0x80, 0x100, 0x10000, 0x10001, 0x80000000, 0xFFFFFFFF])
def test_U4_a_queue_that_there_is_not(device: Device, target: Target, event: int, index: int | str) -> None:
    """CVE-2020-10723: no index is cut down to one that exists."""
    number = device.queues if isinstance(index, str) else index
    before = Idle(target)
    for request, payload, fds in (
        (FrontendRequest.SET_VRING_NUM, VRING_STATE.pack(number, 64), []),
        (FrontendRequest.SET_VRING_ADDR, struct.pack("<IIQQQQ", number, 0, 0, 0, 0, 0), []),
        (FrontendRequest.SET_VRING_BASE, VRING_STATE.pack(number, 0), []),
        (FrontendRequest.GET_VRING_BASE, VRING_STATE.pack(number, 0), []),
        (FrontendRequest.SET_VRING_ENABLE, VRING_STATE.pack(number, 1), []),
        (FrontendRequest.SET_VRING_KICK, U64.pack(number | (1 << 32 if number == 0x100 else 0)), [event]),
        (FrontendRequest.SET_VRING_CALL, U64.pack(number if number != 0x100 else 1 << 63), [event]),
        (FrontendRequest.SET_VRING_ERR, U64.pack(number if number != 0x100 else 0x200), [event]),
    ):
        with target.connect() as frontend:
            frontend.negotiate()
            frontend.send(request, payload, fds)
            assert frontend.is_dropped(), request.name
    assert_unhurt(device, target, before)


# -- U5: memory tables -----------------------------------------------------------------------------------------------

PAGE = 4096


def tables(ram: GuestRam, loose: GuestRam, event: int, plain: int) -> dict[str, tuple[bytes, list[int]]]:
    """Memory tables that must be refused; payload and descriptors."""

    def table(*specs: RegionSpec) -> bytes:
        return MEMORY_HEADER.pack(len(specs), 0) + b"".join(map(pack_region, specs))

    size = ram.size
    most = [RegionSpec(n * PAGE, PAGE, n * PAGE, 0) for n in range(MAX_REGIONS + 1)]
    good = RegionSpec(0, PAGE, 0, 0)
    return {
        "more regions than descriptors": (table(good, RegionSpec(PAGE, PAGE, PAGE, 0)), [ram.fd]),
        "fewer regions than descriptors": (table(good), [ram.fd, ram.fd]),
        "more regions than any": (table(*most[:32]), [ram.fd] * 31),
        "a count beyond the payload": (MEMORY_HEADER.pack(3, 0) + pack_region(good), [ram.fd] * 3),
        "a count of 2^32-1": (MEMORY_HEADER.pack(0xFFFFFFFF, 0) + pack_region(good), [ram.fd]),
        "an empty region": (table(RegionSpec(0, 0, 0, 0)), [ram.fd]),
        "the same twice": (table(good, good), [ram.fd] * 2),
        "one inside another": (
            table(RegionSpec(0, size, 0, 0), RegionSpec(PAGE, PAGE, 1 << 40, 0)),
            [ram.fd] * 2,
        ),
        "guest address wraps": (table(RegionSpec((1 << 64) - PAGE, 2 * PAGE, 0, 0)), [ram.fd]),
        "user address wraps": (table(RegionSpec(0, 2 * PAGE, (1 << 64) - PAGE, 0)), [ram.fd]),
        "offset wraps": (table(RegionSpec(0, 2 * PAGE, 0, (1 << 64) - PAGE)), [ram.fd]),
        "offset and size beyond the file": (table(RegionSpec(0, size, 0, PAGE)), [ram.fd]),
        "larger than the file": (table(RegionSpec(0, size + 1, 0, 0)), [ram.fd]),
        "size 2^63": (table(RegionSpec(0, 1 << 63, 0, 0)), [ram.fd]),
        "not sealed": (table(good), [loose.fd]),
        "an eventfd": (table(good), [event]),
        "a plain file": (table(good), [plain]),
        "good and then bad": (table(good, RegionSpec(PAGE, PAGE, PAGE, 0)), [ram.fd, loose.fd]),
    }


@on_every_device
def test_U5_memory_that_cannot_be_is_refused_whole(
    device: Device, target: Target, event: int, tmp_path: Path
) -> None:
    """No mapping and no descriptor of the table is left, nor of the regions before the bad one."""
    before = Idle(target)
    plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, PAGE)
    with GuestRam(16 * PAGE) as ram, GuestRam(PAGE, seal=False) as loose:
        for case, (payload, fds) in tables(ram, loose, event, plain).items():
            with Rig(target, device.queues) as rig:
                rig.frontend.send(FrontendRequest.SET_MEM_TABLE, payload, fds)
                assert rig.frontend.is_dropped(), case
            if case.startswith(("an empty", "the same", "larger", "not sealed", "an eventfd")):
                with target.connect() as frontend:
                    frontend.negotiate()
                    region = payload[8:40]
                    frontend.send(FrontendRequest.ADD_MEM_REG, bytes(8) + region, fds[:1])
                    if case != "the same twice":
                        assert frontend.is_dropped(), case
    os.close(plain)
    assert_unhurt(device, target, before)


@on_two
@pytest.mark.parametrize("case", ["empty", "huge", "beyond its file", "wraps", "unsealed", "no memfd"])
def test_U5_a_log_that_cannot_be(device: Device, target: Target, event: int, case: str) -> None:
    """SET_LOG_BASE: as careful as with guest memory (CVE-2020-10722); nothing stays mapped."""
    log = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(log, 4096)
        if case != "unsealed":
            fcntl.fcntl(log, F_ADD_SEALS, 0x2)
        size, offset = {
            "empty": (0, 0),
            "huge": (1 << 40, 0),
            "beyond its file": (4096, 1),
            "wraps": (4096, (1 << 64) - 4096),
        }.get(case, (4096, 0))
        fd = event if case == "no memfd" else log
        refused(
            device,
            target,
            pack_request(FrontendRequest.SET_LOG_BASE, U64.pack(size) + U64.pack(offset)),
            [fd],
        )
    finally:
        os.close(log)


@on_two
def test_U5_a_log_that_is_too_small_is_not_written_beyond(device: Device, target: Target) -> None:
    """Pages that it has no bit for are not logged, and nothing else happens; it is replaced while queues run."""
    log = os.memfd_create("guest-ram-log", os.MFD_ALLOW_SEALING)
    before = Idle(target)
    try:
        os.ftruncate(log, 4096)
        fcntl.fcntl(log, F_ADD_SEALS, 0x2)
        with Rig(target, device.queues) as rig:
            for offset in (0, 4095, 17):
                rig.frontend.ask(FrontendRequest.SET_LOG_BASE, U64.pack(1) + U64.pack(offset), [log])
                rig.frontend.tell(FrontendRequest.SET_FEATURES, U64.pack(rig.frontend.features))
                for _ in range(3):
                    device.honest(rig)
        assert set(os.pread(log, 4096, 0)[1:17]) == {0}
    finally:
        os.close(log)
    assert_unhurt(device, target, before)


# -- U6: memory that shrinks -----------------------------------------------------------------------------------------


@on_every_device
def test_U6_memory_cannot_shrink_under_a_session(device: Device, target: Target) -> None:
    """Memory cannot shrink to a SIGBUS: the seal that a table must have forbids it, and it cannot be taken off."""
    before = Idle(target)
    with Rig(target, device.queues) as rig:
        for size in (0, rig.ram.size // 2, rig.ram.size - 1):
            with pytest.raises(PermissionError):
                os.ftruncate(rig.ram.fd, size)
        with pytest.raises(OSError):
            fcntl.fcntl(rig.ram.fd, F_ADD_SEALS, -1)
        os.ftruncate(rig.ram.fd, 2 * rig.ram.size)
        device.honest(rig)
    assert_unhurt(device, target, before)


# -- U7: order -------------------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize(
    "case",
    ["size while running", "base while running", "rings before memory", "memory away", "kick without rings"],
)
def test_U7_messages_out_of_order_are_refused_or_harmless(
    device: Device, target: Target, event: int, case: str
) -> None:
    """tests/property/devices/test_session_order.py tries any order; these have a known answer."""
    before = Idle(target)
    with Rig(target, device.queues) as rig:
        match case:
            case "size while running":
                rig.frontend.send(FrontendRequest.SET_VRING_NUM, VRING_STATE.pack(device.queue, 64))
            case "base while running":
                rig.frontend.send(FrontendRequest.SET_VRING_BASE, VRING_STATE.pack(device.queue, 0))
            case "memory away":
                rig.frontend.send(FrontendRequest.SET_MEM_TABLE, MEMORY_HEADER.pack(0, 0))
            case "kick without rings":
                rig.frontend.stop(device.queue)
                rig.frontend.tell(FrontendRequest.SET_VRING_KICK, U64.pack(device.queue), [event])
                rig.frontend.set_memory(rig.ram)
                rig.restart(device.queue)
                device.honest(rig)
                rig.frontend.send(0)
            case _:
                rig.frontend.close()
                target.settle()
                rig.frontend = target.connect()
                rig.frontend.negotiate()
                rig.frontend.send(FrontendRequest.SET_VRING_NUM, VRING_STATE.pack(0, 64))
                rig.frontend.send(FrontendRequest.SET_VRING_ADDR, pack_address(0, rig.queues[0]))
                rig.frontend.enable(0)
                rig.frontend.send(FrontendRequest.SET_VRING_KICK, U64.pack(0), [event])
        assert rig.frontend.is_dropped()
    assert_unhurt(device, target, before)


# -- U8: silence -----------------------------------------------------------------------------------------------------


@on_two
def test_U8_half_a_header_and_silence(device: Device, target: Target) -> None:
    """Dropped after five seconds (a stepped clock here); the device was free for others on its loop all the time."""
    before = Idle(target)
    skipped = [0.0]
    if isinstance(target, Stepped):
        real = target.loop.now
        target.loop.now = lambda: real() + skipped[0]  # type: ignore[method-assign]
    with target.connect() as frontend:
        start = time.monotonic()
        frontend.send_raw(HEADER.pack(FrontendRequest.GET_FEATURES, 1, 0)[:6])
        target.settle()
        skipped[0] = 5.1
        assert frontend.is_dropped()
        assert isinstance(target, Stepped) or 4.5 < time.monotonic() - start < 8
    assert_unhurt(device, target, before)


@on_every_device
def test_U8_a_connection_that_says_nothing_and_leaves(device: Device, target: Target) -> None:
    """A hundred of them."""
    before = Idle(target)
    for _ in range(100):
        target.connect().close()
        target.settle()
    assert_unhurt(device, target, before)


def test_U8_answers_that_are_never_read(tmp_path: Path) -> None:
    """The socket's buffer is the bound; then the session is dropped."""
    device = DEVICES["echo"]
    with device.stepped(tmp_path) as target:
        before = Idle(target)
        with target.connect() as frontend, pytest.raises(Dropped):
            for _ in range(100_000):
                frontend.send(FrontendRequest.GET_QUEUE_NUM)
        assert_unhurt(device, target, before)

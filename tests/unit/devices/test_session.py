"""One frontend's session: queues go live exactly when everything about them is known; descriptors are always closed."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import struct
import tempfile
from collections.abc import Iterator
from itertools import permutations

import pytest

from rayos_devices.vhost_user.connection import MESSAGE_TIMEOUT
from rayos_devices.vhost_user.message import (
    HEADER,
    MEMORY_HEADER,
    U64,
    VRING_NO_FD,
    VRING_STATE,
    FrontendRequest,
    ProtocolFeature,
    pack_region,
)
from rayos_devices.virtio.features import TRANSPORT_FEATURES, Feature
from rayos_devices.virtio.memory import MAX_REGIONS
from tests.framework.driver import DriverQueue
from tests.framework.echo import EchoBackend
from tests.framework.frontend import Dropped, Frontend, pack_address, pack_memory_table
from tests.framework.guest_memory import GuestRam
from tests.framework.target import Footprint, Rig, Stepped, open_fds


@pytest.fixture
def echo() -> Iterator[Stepped[EchoBackend]]:
    before = Footprint()
    with Stepped(EchoBackend) as target:
        yield target
    before.check()


@pytest.fixture
def rig(echo: Stepped[EchoBackend]) -> Iterator[Rig]:
    with Rig(echo, 2) as rig:
        yield rig


def state(index: int, number: int = 0) -> bytes:
    return VRING_STATE.pack(index, number)


# -- negotiation and configuration -----------------------------------------------------------------------------------


def test_features_are_offered_and_masked(echo: Stepped[EchoBackend]) -> None:
    """Bits that were never offered may be negotiated (QEMU does it); the backend does not see them."""
    with echo.connect() as frontend:
        assert frontend.negotiate() == TRANSPORT_FEATURES
        assert Feature.ANY_LAYOUT | Feature.NOTIFY_ON_EMPTY in Feature(TRANSPORT_FEATURES)
        frontend.tell(FrontendRequest.SET_FEATURES, U64.pack((1 << 64) - 1))
        assert echo.backend.acked_features == TRANSPORT_FEATURES
        frontend.tell(FrontendRequest.SET_FEATURES, U64.pack(Feature.VERSION_1))
        assert echo.backend.acked_features == Feature.VERSION_1


def test_what_was_negotiated_ends_with_the_session(echo: Stepped[EchoBackend]) -> None:
    """The next frontend starts anew."""
    with echo.connect() as frontend:
        frontend.negotiate()
    echo.settle()
    assert echo.backend.acked_features == 0
    assert echo.reasons == ["the frontend left"]


def test_the_device_says_what_it_has(echo: Stepped[EchoBackend]) -> None:
    """Queues, memory slots, protocol features."""
    with echo.connect() as frontend:
        assert frontend.ask_u64(FrontendRequest.GET_QUEUE_NUM) == 2
        assert frontend.ask_u64(FrontendRequest.GET_MAX_MEM_SLOTS) == MAX_REGIONS
        offered = ProtocolFeature(frontend.ask_u64(FrontendRequest.GET_PROTOCOL_FEATURES))
        assert ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG in offered


def test_config_space_is_read_and_written_at_offsets(echo: Stepped[EchoBackend]) -> None:
    """Reads beyond its end are zeros, writes beyond its end are nothing."""
    with echo.connect() as frontend:
        frontend.negotiate()
        assert frontend.get_config(0, 4) == b"echo"
        assert frontend.get_config(5, 20) == b"config space" + bytes(8)
        assert frontend.get_config(200, 3) == bytes(3)
        frontend.set_config(0, b"ECHO")
        frontend.set_config(15, b"CE!!")
        assert frontend.get_config(0, 20) == b"ECHO config spaCE" + bytes(3)


def test_an_acknowledgement_comes_only_where_it_was_asked_for(echo: Stepped[EchoBackend]) -> None:
    """And never beside an answer of its own."""
    with echo.connect() as frontend:
        frontend.send(FrontendRequest.SET_OWNER)
        frontend.send(FrontendRequest.GET_FEATURES, need_reply=True)
        assert frontend.receive()[0] == FrontendRequest.GET_FEATURES
        frontend.send(FrontendRequest.SET_OWNER, need_reply=True)
        assert frontend.receive() == (FrontendRequest.SET_OWNER, 5, U64.pack(0))


# -- queues ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(permutations(["size", "address", "kick", "enable"])), ids="-".join)
def test_a_queue_goes_live_when_everything_is_known_in_any_order(
    echo: Stepped[EchoBackend], order: tuple[str, ...]
) -> None:
    """QEMU's orders differ: net enables before anything else."""
    with GuestRam() as ram, echo.connect() as frontend:
        frontend.negotiate()
        frontend.set_memory(ram)
        queue = DriverQueue(ram, 16)
        for step in order:
            assert not echo.backend.queues[0].attached
            match step:
                case "size":
                    frontend.tell(FrontendRequest.SET_VRING_NUM, state(0, queue.size))
                case "address":
                    frontend.tell(FrontendRequest.SET_VRING_ADDR, pack_address(0, queue))
                case "kick":
                    frontend.tell(FrontendRequest.SET_VRING_KICK, U64.pack(0), [queue.kick_fd])
                case "enable":
                    frontend.enable(0)
        assert echo.backend.queues[0].attached
        queue.close()


def test_without_protocol_features_a_kick_enables(echo: Stepped[EchoBackend]) -> None:
    """vhost-user: rings start enabled when VHOST_USER_F_PROTOCOL_FEATURES was not negotiated."""
    with GuestRam() as ram, echo.connect() as frontend:
        frontend.negotiate(features=int(Feature.VERSION_1))
        frontend.set_memory(ram)
        queue = DriverQueue(ram, 16)
        frontend.start(0, queue, enable=False)
        assert echo.backend.queues[0].attached
        queue.close()


def test_two_queues_work_side_by_side(rig: Rig) -> None:
    """Each with its own rings and eventfds."""
    for index in (0, 1, 0, 1):
        assert rig.request(b"to queue %d" % index, 32, index=index) == b"to queue %d" % index
    assert rig.queues[0].used_index == rig.queues[1].used_index == 2


def test_what_was_offered_before_the_start_is_served(echo: Stepped[EchoBackend]) -> None:
    """A kick before that moment is in no eventfd of ours."""
    with GuestRam() as ram, echo.connect() as frontend:
        frontend.negotiate()
        frontend.set_memory(ram)
        queue = DriverQueue(ram, 16)
        head = queue.add((), [(ram.allocate(4), 4)])
        queue.offer([head])
        frontend.start(0, queue)
        echo.settle()
        assert queue.collect() == [(head, 0)]
        queue.close()


def test_more_than_a_budget_is_served_with_one_kick(rig: Rig) -> None:
    """The leftover is taken up again without another."""
    queue = rig.queues[0]
    room = rig.ram.allocate(1)
    heads = [queue.add((), [(room, 1)]) for _ in range(3 * EchoBackend.BUDGET + 1)]
    queue.offer(heads)
    queue.kick()
    rig.settle()
    assert [head for head, _ in queue.collect()] == heads
    assert isinstance(rig.target, Stepped)
    assert rig.target.backend.queues[0].kicks == 1


def test_a_disabled_queue_rests(rig: Rig) -> None:
    """SET_VRING_ENABLE 0 and 1; nothing is lost meanwhile, and the same again changes nothing."""
    queue = rig.queues[0]
    rig.frontend.enable(0, 0)
    rig.frontend.enable(0, 0)
    head = queue.submit((), [(rig.ram.allocate(4), 4)])
    rig.settle()
    assert queue.collect() == []
    rig.frontend.enable(0, 1)
    rig.frontend.enable(0, 1)
    rig.settle()
    assert queue.collect() == [(head, 0)]


def test_stopping_returns_the_position_and_starting_goes_on_there(rig: Rig) -> None:
    """GET_VRING_BASE, then the same rings with that base."""
    for _ in range(5):
        rig.request(b"x", 1)
    base = rig.frontend.stop(0)
    assert base == 5
    rig.queues[0].kick(always=True)
    rig.settle()
    rig.frontend.start(0, rig.queues[0], base=base)
    assert rig.request(b"again", 8) == b"again"
    rig.restart(0)
    assert rig.request(b"from zero", 9) == b"from zero"


def test_new_memory_under_a_live_queue_keeps_its_position(rig: Rig) -> None:
    """SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG while it runs (memory hotplug)."""
    rig.request(b"before", 6)
    rig.frontend.set_memory(rig.ram)
    assert rig.request(b"same table", 10) == b"same table"
    with GuestRam(4096, guest_address=0x4000_0000) as more:
        payload = bytes(8) + pack_region(more.spec)
        rig.frontend.tell(FrontendRequest.ADD_MEM_REG, payload, [more.fd])
        queue = rig.queues[0]
        source = more.put(b"hotplugged")
        target = rig.ram.allocate(16)
        queue.submit([(source, 10)], [(target, 16)])
        rig.settle()
        assert queue.collect()[0][1] == 10
        assert rig.ram.read(target, 10) == b"hotplugged"
        rig.frontend.tell(FrontendRequest.REM_MEM_REG, payload)
        rig.frontend.tell(FrontendRequest.ADD_MEM_REG, payload, [more.fd])
        rig.frontend.tell(FrontendRequest.REM_MEM_REG, payload, [more.fd])
        head = queue.submit([(source, 10)], [(target, 16)])
        rig.settle()
        assert queue.collect() == [(head, 0)], "the region is gone: a chain fault"
    assert rig.request(b"after", 6) == b"after"


def test_a_resumed_session_takes_its_position_from_the_used_ring() -> None:
    """A predecessor was killed: go on after what it completed, and call once, since its call may be lost."""
    with GuestRam() as ram:
        queue = DriverQueue(ram, 16)
        heads = [queue.add((), [(ram.allocate(4), 4)]) for _ in range(3)]
        queue.offer(heads)
        ram.slice(queue.used, 8).cast("H")[1] = 2
        with Stepped(EchoBackend, resume=True) as target, target.connect() as frontend:
            frontend.negotiate()
            frontend.set_memory(ram)
            frontend.start(0, queue)
            target.settle()
            assert target.backend.started == [(0, True)]
            assert target.backend.queues[0].requests == 1
            assert queue.was_called()
            frontend.stop(0)
            frontend.start(0, queue, base=3)
            assert target.backend.started == [(0, True), (0, False)], "only the first start is resumed"
        queue.close()


def test_reset_owner_stops_every_queue(rig: Rig) -> None:
    """As a reset of the device."""
    rig.frontend.tell(FrontendRequest.RESET_OWNER)
    assert isinstance(rig.target, Stepped)
    assert not any(queue.attached for queue in rig.target.backend.queues)
    assert sorted(rig.target.backend.stopped) == [0, 1]


def test_chains_in_flight_come_again_after_a_stop() -> None:
    """The backend gave them back; nothing is written to them after the answer to GET_VRING_BASE."""
    with Stepped(lambda loop: EchoBackend(loop, is_slow=True)) as target, Rig(target, 1) as rig:
        queue = rig.queues[0]
        head = queue.submit([(rig.ram.put(b"slow"), 4)], [(rig.ram.allocate(4), 4)])
        rig.settle()
        base = rig.frontend.stop(0)
        assert base == 0
        target.backend.complete()
        assert queue.collect() == []
        rig.frontend.start(0, queue, base=base)
        rig.settle()
        target.backend.complete()
        assert queue.collect() == [(head, 4)]


# -- class P: refused, everything closed, the next frontend is served ------------------------------------------------


def misuse(name: str, rig: Rig) -> tuple[FrontendRequest, bytes, list[int]]:
    """A well-formed message that breaks the protocol in a running session of two queues."""
    event = rig.queues[0].kick_fd
    queue = rig.queues[0]
    address = pack_address(0, queue)
    index, flags, table, used, avail, log = struct.unpack("<IIQQQQ", address)

    def at(*, table: int = table, used: int = used, avail: int = avail, index: int = index) -> bytes:
        return struct.pack("<IIQQQQ", index, flags, table, used, avail, log)

    end = rig.ram.user(rig.ram.end)
    overlap = MEMORY_HEADER.pack(2, 0) + pack_region(rig.ram.spec) * 2
    cases: dict[str, tuple[FrontendRequest, bytes, list[int]]] = {
        "size 0": (FrontendRequest.SET_VRING_NUM, state(2, 0), []),
        "size while running": (FrontendRequest.SET_VRING_NUM, state(0, 256), []),
        "base while running": (FrontendRequest.SET_VRING_BASE, state(0, 0), []),
        "queue beyond the last": (FrontendRequest.SET_VRING_ENABLE, state(2, 1), []),
        "queue 0x10001": (FrontendRequest.SET_VRING_ENABLE, state(0x10001, 1), []),
        "queue 2^32-1": (FrontendRequest.GET_VRING_BASE, state(0xFFFFFFFF), []),
        "kick of a missing queue": (FrontendRequest.SET_VRING_KICK, U64.pack(2), [event]),
        "call of queue 0x10000": (FrontendRequest.SET_VRING_CALL, U64.pack(0x10000), [event]),
        "kick without descriptor": (FrontendRequest.SET_VRING_KICK, U64.pack(0), []),
        "call without descriptor": (FrontendRequest.SET_VRING_CALL, U64.pack(0), []),
        "a descriptor and none": (FrontendRequest.SET_VRING_ERR, U64.pack(VRING_NO_FD), [event]),
        "table misaligned": (FrontendRequest.SET_VRING_ADDR, at(table=table + 8), []),
        "avail misaligned": (FrontendRequest.SET_VRING_ADDR, at(avail=avail + 1), []),
        "used misaligned": (FrontendRequest.SET_VRING_ADDR, at(used=used + 2), []),
        "table outside": (FrontendRequest.SET_VRING_ADDR, at(table=end), []),
        "avail across the end": (FrontendRequest.SET_VRING_ADDR, at(avail=end - 2), []),
        "used outside": (FrontendRequest.SET_VRING_ADDR, at(used=(1 << 64) - 4), []),
        "address of a missing queue": (FrontendRequest.SET_VRING_ADDR, at(index=7), []),
        "memory without descriptors": (FrontendRequest.SET_MEM_TABLE, pack_memory_table([rig.ram]), []),
        "memory that overlaps": (FrontendRequest.SET_MEM_TABLE, overlap, [rig.ram.fd, rig.ram.fd]),
        "no memory for the rings": (FrontendRequest.SET_MEM_TABLE, MEMORY_HEADER.pack(0, 0), []),
        "memory added twice": (
            FrontendRequest.ADD_MEM_REG,
            bytes(8) + pack_region(rig.ram.spec),
            [rig.ram.fd],
        ),
        "memory of the rings removed": (
            FrontendRequest.REM_MEM_REG,
            bytes(8) + pack_region(rig.ram.spec),
            [],
        ),
        "a GPU's socket": (FrontendRequest.GPU_SET_SOCKET, b"", [event]),
    }
    return cases[name]


MISUSES = [
    "size 0",
    "size while running",
    "base while running",
    "queue beyond the last",
    "queue 0x10001",
    "queue 2^32-1",
    "kick of a missing queue",
    "call of queue 0x10000",
    "kick without descriptor",
    "call without descriptor",
    "a descriptor and none",
    "table misaligned",
    "avail misaligned",
    "used misaligned",
    "table outside",
    "avail across the end",
    "used outside",
    "address of a missing queue",
    "memory without descriptors",
    "memory that overlaps",
    "no memory for the rings",
    "memory added twice",
    "memory of the rings removed",
    "a GPU's socket",
]


@pytest.mark.parametrize("case", MISUSES)
def test_a_broken_protocol_ends_the_session(echo: Stepped[EchoBackend], case: str) -> None:
    """The socket is closed, with a sentence of why; the next session works."""
    with Rig(echo, 2) as rig:
        request, payload, fds = misuse(case, rig)
        rig.frontend.send(request, payload, fds)
        assert rig.frontend.is_dropped()
    assert len(echo.reasons) == 1 and echo.reasons[0] != "the frontend left"
    assert not any(queue.attached for queue in echo.backend.queues)
    with Rig(echo, 2) as rig:
        assert rig.request(b"works", 8, index=1) == b"works"


#: Of the misuses, those that have an answer of their own.
UNANSWERED = ("queue 2^32-1",)


@pytest.mark.parametrize("case", [case for case in MISUSES if case not in UNANSWERED])
def test_a_misuse_that_asks_for_an_answer_gets_one(echo: Stepped[EchoBackend], case: str) -> None:
    """vhost-user, REPLY_ACK: non-zero for a failure. Nothing has changed: the queues that ran, run."""
    refusals: list[str] = []
    echo.on_refusal = refusals.append
    with Rig(echo, 2) as rig:
        request, payload, fds = misuse(case, rig)
        assert rig.frontend.is_refused(request, payload, fds)
        assert len(refusals) == 1
        if request is not FrontendRequest.SET_VRING_ADDR:
            assert rig.request(b"works", 8, index=1) == b"works"
            assert rig.request(b"works", 8, index=0) == b"works"
        else:
            rig.frontend.tell(request, pack_address(0, rig.queues[0]))
            assert rig.request(b"works", 8, index=0) == b"works"
    assert echo.reasons == ["the frontend left"]


@pytest.mark.parametrize(
    ("offset", "size", "room"),
    [(255, 2, 2), (200, 57, 57), (0, 60, 0), (0, 4, 8), (0, 257, 244), ((1 << 32) - 1, 1, 1)],
)
def test_a_configuration_that_cannot_be_read_is_an_empty_answer(
    echo: Stepped[EchoBackend], offset: int, size: int, room: int
) -> None:
    """vhost-user, GET_CONFIG: a payload of no bytes is an error; the session goes on."""
    with echo.connect() as frontend:
        frontend.negotiate()
        payload = struct.pack("<III", offset, size, 0) + bytes(room)
        assert frontend.ask(FrontendRequest.GET_CONFIG, payload) == b""
        assert frontend.get_config(0, 4) == b"echo"


@pytest.mark.parametrize("size", [0, 3, 5, 2048, 1 << 31])
def test_a_queue_has_a_power_of_two_of_entries(echo: Stepped[EchoBackend], size: int) -> None:
    """Up to 1024."""
    with echo.connect() as frontend:
        frontend.negotiate()
        assert frontend.is_refused(FrontendRequest.SET_VRING_NUM, state(0, size))


def make_fd(kind: str) -> int:
    match kind:
        case "pipe":
            ours, theirs = os.pipe()
            os.close(ours)
            return theirs
        case "reading end":
            ours, theirs = os.pipe()
            os.close(theirs)
            return ours
        case "socket":
            sock, other = socket.socketpair()
            other.close()
            return sock.detach()
        case "file":
            with tempfile.TemporaryFile() as file:
                return os.dup(file.fileno())
        case "directory":
            return os.open("/", os.O_RDONLY)
        case "epoll":
            with select.epoll() as epoll:
                return os.dup(epoll.fileno())
        case "memfd":
            return os.memfd_create("kick")
        case "pidfd":
            return os.pidfd_open(os.getpid())
        case _:
            return signal_fd()


def signal_fd() -> int:
    """signalfd is not in Python's os module."""
    from ctypes import CDLL, byref, c_uint64

    mask = c_uint64(1 << (signal.SIGUSR2 - 1))
    return int(CDLL(None).signalfd(-1, byref(mask), 0))


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        (kind, request)
        for kind in (
            "pipe",
            "reading end",
            "socket",
            "file",
            "directory",
            "epoll",
            "memfd",
            "pidfd",
            "signalfd",
        )
        for request in (
            FrontendRequest.SET_VRING_KICK,
            FrontendRequest.SET_VRING_CALL,
            FrontendRequest.SET_VRING_ERR,
        )
        if kind != "pipe" or request is FrontendRequest.SET_VRING_KICK
    ],
)
def test_only_an_eventfd_kicks_and_calls(
    echo: Stepped[EchoBackend], kind: str, request_: FrontendRequest
) -> None:
    """Anything else could block or break the loop: the frontend's fault, not ours."""
    fd = make_fd(kind)
    with echo.connect() as frontend:
        frontend.negotiate()
        frontend.send(request_, U64.pack(0), [fd])
        os.close(fd)
        assert frontend.is_dropped()
    assert "no eventfd" in echo.reasons[0]


def test_a_pipe_is_called_and_told_of_errors(echo: Stepped[EchoBackend]) -> None:
    """User Mode Linux listens to one. Full, it says enough; without a reader it is nobody's."""
    with Rig(echo, 2) as rig:
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        rig.frontend.tell(FrontendRequest.SET_VRING_ERR, U64.pack(0), [theirs])
        rig.frontend.tell(FrontendRequest.SET_VRING_CALL, U64.pack(0), [theirs])
        assert os.read(ours, 100) == (1).to_bytes(8, "little"), "the queue is live: called once"
        rig.request(b"works", 8)
        assert len(os.read(ours, 100)) == 8
        os.set_blocking(theirs, False)
        while True:
            try:
                os.write(theirs, bytes(4096))
            except BlockingIOError:
                break
        assert rig.request(b"works", 8) == b"works"
        os.close(ours)
        assert rig.request(b"works", 8) == b"works"
        os.close(theirs)


def test_a_call_that_would_block_does_not(echo: Stepped[EchoBackend]) -> None:
    """A blocking eventfd that is full: the loop serves the others all the same."""
    with Rig(echo, 2) as rig:
        full = os.eventfd(0, 0)
        os.eventfd_write(full, (1 << 64) - 2)
        rig.frontend.tell(FrontendRequest.SET_VRING_CALL, U64.pack(0), [full])
        queue = rig.queues[0]
        head = queue.submit((), [(rig.ram.allocate(4), 4)])
        rig.settle()
        assert queue.collect() == [(head, 0)]
        os.close(full)


def test_descriptors_may_be_taken_away_and_replaced(rig: Rig) -> None:
    """The no-descriptor bit; a queue without a call descriptor is polled by its driver."""
    gc.collect()
    before = open_fds()
    for _ in range(20):
        for request in (
            FrontendRequest.SET_VRING_CALL,
            FrontendRequest.SET_VRING_ERR,
            FrontendRequest.SET_VRING_KICK,
        ):
            rig.frontend.tell(request, U64.pack(0), [rig.queues[0].kick_fd])
    assert open_fds() == before
    rig.frontend.tell(FrontendRequest.SET_VRING_CALL, U64.pack(0 | VRING_NO_FD))
    rig.frontend.tell(FrontendRequest.SET_VRING_ERR, U64.pack(0 | VRING_NO_FD))
    assert open_fds() == before - 2
    rig.queues[0].submit((), [(rig.ram.allocate(4), 4)])
    rig.settle()
    assert len(rig.queues[0].collect()) == 1
    assert not rig.queues[0].was_called()


# -- the connection --------------------------------------------------------------------------------------------------


def test_messages_may_come_in_any_pieces(echo: Stepped[EchoBackend]) -> None:
    """A byte at a time, and many at once."""
    message = HEADER.pack(FrontendRequest.SET_FEATURES, 1 | 8, 8) + U64.pack(Feature.VERSION_1)
    with echo.connect() as frontend:
        for byte in message:
            frontend.send_raw(bytes([byte]))
            echo.settle()
        assert frontend.receive() == (FrontendRequest.SET_FEATURES, 5, U64.pack(0))
        frontend.send_raw(message * 50)
        for _ in range(50):
            assert frontend.receive()[0] == FrontendRequest.SET_FEATURES


def test_half_a_message_is_waited_for_a_while(echo: Stepped[EchoBackend]) -> None:
    """Then the frontend is dropped; a whole message takes the deadline back."""
    clock = [1000.0]
    echo.loop.now = lambda: clock[0]  # type: ignore[method-assign]
    with echo.connect() as frontend:
        frontend.send_raw(HEADER.pack(FrontendRequest.SET_FEATURES, 1, 8)[:5])
        echo.settle()
        clock[0] += MESSAGE_TIMEOUT - 0.1
        echo.settle()
        frontend.send_raw(HEADER.pack(FrontendRequest.SET_FEATURES, 1, 8)[5:] + bytes(8))
        echo.settle()
        clock[0] += 2 * MESSAGE_TIMEOUT
        echo.settle()
        assert echo.reasons == []
        frontend.send_raw(b"\1")
        echo.settle()
        clock[0] += MESSAGE_TIMEOUT + 0.1
        assert frontend.is_dropped()
    assert "half a message" in echo.reasons[0]


def test_a_frontend_that_drips_is_dropped_as_well(echo: Stepped[EchoBackend]) -> None:
    """The deadline is for the whole message: a byte now and then does not move it."""
    clock = [1000.0]
    echo.loop.now = lambda: clock[0]  # type: ignore[method-assign]
    with echo.connect() as frontend:
        try:
            for byte in HEADER.pack(FrontendRequest.SET_FEATURES, 1, 8):
                frontend.send_raw(bytes([byte]))
                echo.settle()
                clock[0] += MESSAGE_TIMEOUT / 3
                echo.settle()
        except Dropped:
            pass
        assert frontend.is_dropped()
    assert clock[0] <= 1000.0 + 2 * MESSAGE_TIMEOUT


def test_a_frontend_that_reads_no_answers_is_dropped(echo: Stepped[EchoBackend]) -> None:
    """Answers that it does not take are not kept for it."""
    with echo.connect() as frontend, pytest.raises(Dropped):
        for _ in range(100_000):
            frontend.send(FrontendRequest.GET_FEATURES)


def test_a_session_serves_many_frontends_in_turn(echo: Stepped[EchoBackend]) -> None:
    """Nothing of one is left to the next."""
    before = Footprint()
    for turn in range(30):
        with Rig(echo, 2) as rig:
            assert rig.request(b"%d" % turn, 8) == b"%d" % turn
    before.check()


def test_the_frontend_may_leave_in_the_middle_of_work() -> None:
    """Chains in flight go, the backend goes on."""
    with Stepped(lambda loop: EchoBackend(loop, is_slow=True)) as target:
        with Rig(target, 1) as rig:
            rig.queues[0].submit((), [(rig.ram.allocate(4), 4)])
            rig.settle()
            assert len(target.backend.held) == 1
        assert len(target.backend.held) == 0
        frontend: Frontend = target.connect()
        assert frontend.ask_u64(FrontendRequest.GET_QUEUE_NUM) == 2
        frontend.close()


# -- the device as a whole -------------------------------------------------------------------------------------------


def test_a_reset_device_starts_anew_on_the_same_memory_and_signals(
    echo: Stepped[EchoBackend], rig: Rig
) -> None:
    """RESET_DEVICE: QEMU sends features and rings again, but neither memory nor error descriptors."""
    assert rig.request(b"before", 6) == b"before"
    rig.frontend.tell(FrontendRequest.RESET_DEVICE)
    assert not any(queue.attached for queue in echo.backend.queues)
    assert echo.backend.acked_features == 0
    rig.frontend.tell(FrontendRequest.SET_FEATURES, U64.pack(rig.frontend.features))
    for index, queue in enumerate(rig.queues):
        queue.reset()
        rig.frontend.set_ring(index, queue)
        rig.frontend.tell(FrontendRequest.SET_VRING_KICK, U64.pack(index), [queue.kick_fd])
        rig.frontend.enable(index)
    assert rig.request(b"after", 5) == b"after"
    rig.queues[0].was_called()
    assert rig.request(b"again", 5) == b"again" and rig.queues[0].was_called()
    rig.queues[0].set_avail_index(1000)
    rig.queues[0].kick(always=True)
    rig.settle()
    assert rig.queues[0].has_error()


def test_a_ring_that_was_stopped_keeps_its_call(echo: Stepped[EchoBackend], rig: Rig) -> None:
    """A driver that resets one queue (RING_RESET) is not sent its call again by QEMU."""
    rig.frontend.stop(0)
    rig.queues[0].reset()
    rig.frontend.set_ring(0, rig.queues[0])
    rig.frontend.tell(FrontendRequest.SET_VRING_KICK, U64.pack(0), [rig.queues[0].kick_fd])
    assert rig.request(b"once more", 9) == b"once more"
    assert rig.queues[0].was_called()


def test_the_status_is_kept_and_shown(echo: Stepped[EchoBackend], rig: Rig) -> None:
    """SET_STATUS, GET_STATUS; it ends with the session."""
    rig.frontend.tell(FrontendRequest.SET_STATUS, U64.pack(0xF))
    assert rig.frontend.ask_u64(FrontendRequest.GET_STATUS) == 0xF
    assert echo.backend.snapshot()["status"] == ["acknowledge", "driver", "driver_ok", "features_ok"]
    rig.frontend.close()
    echo.settle()
    assert echo.backend.snapshot()["status"] == []


def test_a_changed_configuration_is_told_on_the_backends_channel(
    echo: Stepped[EchoBackend], rig: Rig
) -> None:
    """One message each; what changed before there was a channel is told on it, once; and none waits for a frontend
    that does not read."""
    for _ in range(3):
        echo.backend.tell_config_change()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            rig.frontend.tell(FrontendRequest.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        assert ours.recv(100) == HEADER.pack(2, 1, 0)
        echo.backend.tell_config_change()
        assert ours.recv(100) == HEADER.pack(2, 1, 0)
        for _ in range(10_000):
            echo.backend.tell_config_change()
    assert rig.request(b"still here", 10) == b"still here"

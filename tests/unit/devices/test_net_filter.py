"""The filter of a network card: what is judged is what passes, a flow is asked for once, memory is fixed."""

from __future__ import annotations

import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rayos_devices.native import Buffers, address_of
from rayos_devices.net.backend import RX, TX, NetBackend
from rayos_devices.net.filter import HOLD_NS, SETS, WAYS, Filter
from rayos_devices.net.outcome import ALLOW, DENY, HOLDS, REJECT, SLOT_SHIFT, SLOTS
from rayos_devices.net.wire import HEADER_BYTES
from tests.framework.target import Rig, Stepped
from tests.framework.wire import Wire

MAC = b"\x52\x59\0\0\0\1"
OTHER = b"\x52\x59\0\0\0\2"
HEADER = bytes(HEADER_BYTES)


class Judge:
    """Answers as it is told, and remembers what it was asked."""

    def __init__(self, verdict: int = ALLOW | HOLDS | 1 << SLOT_SHIFT) -> None:
        self.mac = MAC
        self.epoch = memoryview(array("Q", [1]))
        self.page = memoryview(array("Q", [0]))
        self.hits = memoryview(array("Q", bytes(8 * SLOTS)))
        self.answers: deque[tuple[bool, bytes]] = deque()
        self.verdict = verdict
        self.asked: list[tuple[bytes, bool, float]] = []
        self.on_ask: Callable[[bytes], None] = lambda frame: None

    def judge(self, frame: bytes, is_outgoing: bool, now: float) -> int:
        self.asked.append((frame, is_outgoing, now))
        self.on_ask(frame)
        return self.verdict

    def snapshot(self) -> dict[str, Any]:
        return {}


def udp4(port: int = 9, source: bytes = MAC, target: bytes = OTHER, size: int = 20, host: int = 1) -> bytes:
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, 28 + size, 0, 0, 64, 17, 0, 0x0A000002, 0x0A000000 + host)
    return target + source + b"\x08\0" + ip + struct.pack("!HHHH", 1000, port, 8 + size, 0) + bytes(size)


def tcp4(port: int = 80, flags: int = 0x4000, doff: int = 5, size: int = 0) -> bytes:
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, 40 + size, 7, flags, 64, 6, 0, 0x0A000002, 0x0A000001)
    return (
        OTHER
        + MAC
        + b"\x08\0"
        + ip
        + struct.pack("!HHIIBBHHH", 1, port, 0, 0, doff << 4, 16, 0, 0, 0)
        + bytes(size)
    )


def udp6(port: int = 9, tail: int = 1) -> bytes:
    ip = (
        struct.pack("!IHBB", 6 << 28, 28, 17, 64)
        + b"\xfe\x80"
        + bytes(13)
        + b"\2"
        + b"\xfe\x80"
        + bytes(13)
        + bytes([tail])
    )
    return OTHER + MAC + b"\x86\xdd" + ip + struct.pack("!HHHH", 1000, port, 28, 0) + bytes(20)


def check(filter: Filter, data: bytes, now_ns: int = 0) -> int:
    """Returns the filter's verdict on a frame with its header."""
    memory = bytearray(data)
    buffers = Buffers()
    buffers.add(address_of(memory), len(memory))
    return filter.check(buffers, len(memory), now_ns)


@pytest.fixture
def judge() -> Judge:
    return Judge()


@pytest.fixture
def out(judge: Judge) -> Filter:
    return Filter(judge, is_outgoing=True)


@pytest.mark.parametrize("frame", [udp4(), tcp4(), udp6()], ids=["udp", "tcp", "udp6"])
def test_a_flow_is_asked_for_once(judge: Judge, out: Filter, frame: bytes) -> None:
    """And counted under its rule each time; another port, address or direction is another flow."""
    for _ in range(10):
        assert check(out, HEADER + frame) == ALLOW
    assert [one[:2] for one in judge.asked] == [(frame, True)]
    assert judge.hits[1] == 10
    for other in (udp4(10), udp4(host=3), tcp4(81), udp6(10), udp6(tail=3)):
        check(out, HEADER + other)
        check(out, HEADER + other)
    assert len(judge.asked) == 6


def test_a_verdict_ends_with_the_table_the_lease_and_the_second(judge: Judge, out: Filter) -> None:
    """A change of either word acts on the very next frame, and nothing is believed for ever."""
    data = HEADER + udp4()
    assert check(out, data) == ALLOW
    judge.verdict = DENY | HOLDS
    assert check(out, data, HOLD_NS - 1) == ALLOW
    judge.epoch[0] += 1
    assert check(out, data) == DENY
    judge.verdict = ALLOW | HOLDS
    assert check(out, data) == DENY
    judge.page[0] += 1
    assert check(out, data) == ALLOW
    judge.verdict = DENY | HOLDS
    assert check(out, data, HOLD_NS) == DENY


def test_a_verdict_that_was_overtaken_is_not_remembered(judge: Judge, out: Filter) -> None:
    """The rules changed while the judge thought: the next frame is judged by the new ones."""

    def change(_frame: bytes) -> None:
        judge.epoch[0] += 1

    judge.on_ask = change
    check(out, HEADER + udp4())
    judge.on_ask = lambda frame: None
    check(out, HEADER + udp4())
    assert len(judge.asked) == 2


def test_what_does_not_hold_is_asked_for_each_time(judge: Judge, out: Filter) -> None:
    judge.verdict = ALLOW
    for _ in range(3):
        assert check(out, HEADER + udp4()) == ALLOW
    assert len(judge.asked) == 3 and judge.hits[0] == 0


ODD = {
    "another's card": udp4(source=OTHER),
    "to all": udp4(target=b"\xff" * 6),
    "dhcp": udp4(67),
    "fragment": tcp4(flags=0x2000),
    "options": udp4()[:14] + b"\x46" + udp4()[15:] + bytes(4),
    "tcp header short": tcp4(doff=4),
    "tcp header long": tcp4(doff=6),
    "ip too long": udp4()[:16] + b"\xff" + udp4()[17:],
    "udp too long": udp4()[:38] + b"\x7f" + udp4()[39:],
    "arp": OTHER + MAC + b"\x08\x06" + bytes(28),
    "short": (OTHER + MAC + b"\x08\0" + b"\x45").ljust(30, b"\0"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_frame_is_never_remembered(judge: Judge, out: Filter, name: str) -> None:
    """Neither it nor, by it, the plain frame that it resembles."""
    for _ in range(2):
        assert check(out, HEADER + ODD[name]) == ALLOW
    assert len(judge.asked) == 2
    check(out, HEADER + udp4())
    check(out, HEADER + tcp4())
    assert len(judge.asked) == 4


def test_a_flood_of_flows_takes_no_memory_and_pushes_out_no_stranger(judge: Judge, out: Filter) -> None:
    """However many there are, the verdict is each flow's own, and a flow is forgotten at worst."""
    verdicts = {True: DENY | HOLDS, False: ALLOW | HOLDS}
    judge.on_ask = lambda frame: setattr(judge, "verdict", verdicts[frame[33] % 2 == 0])
    flows = 3 * SETS * WAYS // 250
    for _ in range(2):
        for port in range(flows):
            for host in range(1, 251):
                assert check(out, HEADER + udp4(1000 + port, host=host)) == (DENY if host % 2 == 0 else ALLOW)
    assert len(judge.asked) <= 2 * flows * 250


#: flags, gso type, csum_start, csum_offset; whether it may pass
OFFLOADS = [
    (tcp4(), (1, 0, 34, 16), True),
    (tcp4(), (1, 1, 34, 16), True),
    (tcp4(), (1, 0x81, 34, 16), True),
    (udp4(), (1, 0, 34, 6), True),
    (udp6(), (1, 0, 54, 6), True),
    (udp4(target=b"\xff" * 6), (1, 0, 34, 6), True),
    (tcp4(), (0, 1, 34, 16), False),
    (tcp4(), (1, 4, 34, 16), False),
    (tcp4(), (1, 3, 34, 16), False),
    (udp4(), (1, 1, 34, 6), False),
    (tcp4(), (1, 0, 14, 12), False),
    (tcp4(), (1, 0, 34, 0), False),
    (tcp4(), (1, 0, 26, 4), False),
    (udp4(), (1, 0, 34, 16), False),
    (ODD["arp"], (1, 0, 14, 14), False),
    (ODD["options"], (1, 0, 38, 6), False),
]


@pytest.mark.parametrize(("frame", "offload", "passes"), OFFLOADS)
def test_an_offload_writes_only_the_checksum_of_its_transport(
    judge: Judge, out: Filter, frame: bytes, offload: tuple[int, int, int, int], passes: bool
) -> None:
    """Else the kernel would write a sum that the guest chose over an address or a port that was checked."""
    flags, kind, start, where = offload
    header = struct.pack("<BBHHHHH", flags, kind, 0, 1000, start, where, 0)
    assert check(out, header + frame) == (ALLOW if passes else DENY)
    assert out.offload == (not passes)


# -- in the device ---------------------------------------------------------------------------------------------------


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def rig(judge: Judge, wire: Wire) -> Iterator[Rig]:
    with Stepped(lambda loop: NetBackend("net", loop, wire, judge=judge)) as target, Rig(target, 2) as rig:
        yield rig


def denials(rig: Rig) -> dict[str, int]:
    assert isinstance(rig.target, Stepped)
    found = rig.target.backend.snapshot()["denials"]
    assert isinstance(found, dict)
    return found


def offer(rig: Rig, *lengths: int) -> list[int]:
    """Receive buffers, and where they are."""
    places = [rig.ram.put(b"\xee" * length) for length in lengths]
    heads = [rig.queues[RX].add((), [(at, length)]) for at, length in zip(places, lengths, strict=True)]
    rig.queues[RX].offer(heads)
    rig.queues[RX].kick(always=True)
    rig.settle()
    return places


@pytest.mark.parametrize("size", [20, 1400, 9000, 65000])
@pytest.mark.parametrize("pieces", [1, 2, 159, 160, 300])
def test_what_was_judged_is_what_leaves(rig: Rig, judge: Judge, wire: Wire, size: int, pieces: int) -> None:
    """The guest rewrites the frame while the judge looks at it, and again while it is remembered."""
    frame = udp4(size=size)
    data = HEADER + frame
    at = rig.ram.put(data)
    step = max(1, len(data) // pieces)
    cuts = [*range(0, len(data), step)][:pieces]
    buffers = [(at + cut, end - cut) for cut, end in zip(cuts, [*cuts[1:], len(data)], strict=True)]

    def rewrite(_frame: bytes) -> None:
        rig.ram.write(at + HEADER_BYTES, b"\xaa" * 60)

    judge.on_ask = rewrite
    rig.queues[TX].submit(buffers, indirect=len(buffers) > 1)
    rig.wait_used(TX)
    assert wire.sent == [data]
    rig.ram.write(at, data)
    rig.queues[TX].submit(buffers, indirect=len(buffers) > 1)
    rig.wait_used(TX)
    assert wire.sent == [data, data]
    assert [one[0] for one in judge.asked] == [frame]


def test_a_refused_frame_does_not_leave_and_is_counted(rig: Rig, judge: Judge, wire: Wire) -> None:
    judge.verdict = DENY | HOLDS
    for _ in range(5):
        rig.queues[TX].submit([(rig.ram.put(HEADER + udp4()), HEADER_BYTES + 62)])
        rig.wait_used(TX)
    assert wire.sent == [] and denials(rig) == {"firewall": 5}
    assert judge.hits[0] == 5


def test_a_refused_frame_never_is_in_guest_memory(rig: Rig, judge: Judge, wire: Wire) -> None:
    """Not even for a moment: the guest could read its buffer before it is used. The next frame gets the buffer."""
    (at,) = offer(rig, 2048)
    refused, admitted = udp4(9, OTHER, MAC), udp4(10, OTHER, MAC)
    judge.on_ask = lambda frame: setattr(judge, "verdict", DENY if frame == refused else ALLOW)
    wire.arrive(HEADER + refused)
    rig.settle()
    assert rig.ram.read(at, 2048) == b"\xee" * 2048
    assert denials(rig) == {"firewall": 1}
    wire.arrive(HEADER + admitted)
    ((_, written),) = rig.wait_used(RX)
    assert rig.ram.read(at, written)[HEADER_BYTES:] == admitted


def test_an_admitted_frame_may_be_spread_over_buffers(rig: Rig, wire: Wire) -> None:
    """Mergeable buffers, as without a filter."""
    places = offer(rig, 40, 20, 500)
    frame = udp4(9, OTHER, MAC, size=100)
    wire.arrive(HEADER + frame)
    used = rig.wait_used(RX, 3)
    joined = b"".join(rig.ram.read(at, written) for at, (_, written) in zip(places, used, strict=True))
    assert joined[HEADER_BYTES:] == frame and joined[10:12] == b"\3\0"


def test_an_answer_to_a_refused_frame_comes_to_its_sender(rig: Rig, judge: Judge, wire: Wire) -> None:
    """Into the guest's receive queue, or out of the port; without a buffer it is lost."""
    judge.verdict = REJECT
    answer = udp4(1, OTHER, MAC)
    judge.on_ask = lambda frame: judge.answers.append((frame[6:12] == MAC, answer))
    rig.queues[TX].submit([(rig.ram.put(HEADER + udp4()), HEADER_BYTES + 62)])
    rig.wait_used(TX)
    assert not judge.answers
    (at,) = offer(rig, 2048)
    rig.queues[TX].submit([(rig.ram.put(HEADER + udp4()), HEADER_BYTES + 62)])
    ((_, written),) = rig.wait_used(RX)
    assert rig.ram.read(at, written) == HEADER[:10] + b"\1\0" + answer
    offer(rig, 2048)
    wire.arrive(HEADER + udp4(9, OTHER, MAC))
    rig.settle()
    assert wire.sent == [HEADER + answer]

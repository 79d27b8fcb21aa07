"""The input devices as a driver and as whoever injects see them."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator

import pytest

from rayos_devices.errors import ConfigurationError, RequestError
from rayos_devices.gate import EVERYTHING, Gate, Op
from rayos_devices.input.backend import MAX_QUEUE_LIMIT, InputBackend
from rayos_devices.input.codes import Button, Key
from rayos_devices.input.model import KINDS
from rayos_devices.input.wire import (
    ABS_INFO,
    CONFIG_BYTES,
    EVENT,
    Abs,
    EventType,
    Led,
    Rel,
    Select,
    pack_bits,
)
from rayos_devices.loop import Loop
from tests.framework.target import Rig, Stepped

SYN = (0, 0, 0)
PRESS = [(EventType.KEY, Key.KEY_A, 1), SYN, (EventType.KEY, Key.KEY_A, 0), SYN]
Event = tuple[int, int, int]


@pytest.fixture
def target() -> Iterator[Stepped[InputBackend]]:
    with Stepped(lambda loop: InputBackend("kbd0", loop, "keyboard")) as stepped:
        yield stepped


@pytest.fixture
def rig(target: Stepped[InputBackend]) -> Iterator[Rig]:
    with Rig(target, 2, size=64) as rig:
        yield rig


class Buffers:
    """The event queue's buffers of a driver."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.rooms: dict[int, int] = {}

    def offer(self, count: int, size: int = EVENT.size) -> None:
        queue = self.rig.queues[0]
        for _ in range(count):
            address = self.rig.ram.allocate(size)
            head = queue.add((), [(address, size)])
            self.rooms[head] = address
            queue.offer([head])
        queue.kick()

    def events(self) -> list[Event]:
        self.rig.settle()
        return [
            EVENT.unpack(self.rig.ram.read(self.rooms[head], size))
            for head, size in self.rig.queues[0].collect()
            if size
        ]


def select(rig: Rig, what: int, subsel: int = 0) -> bytes:
    """As QEMU asks: two writes of a byte, one read of all."""
    rig.frontend.set_config(0, bytes((what,)))
    rig.frontend.set_config(1, bytes((subsel,)))
    config = rig.frontend.get_config(0, CONFIG_BYTES)
    assert config[:2] == bytes((what, subsel))
    assert not any(config[8 + config[2] :])
    return config[8 : 8 + config[2]]


# -- configuration space ---------------------------------------------------------------------------------------------


def test_what_a_keyboard_tells(rig: Rig) -> None:
    assert select(rig, Select.ID_NAME) == b"RayOS keyboard"
    assert select(rig, Select.ID_SERIAL) == b"kbd0"
    assert struct.unpack("<HHH", select(rig, Select.ID_DEVIDS)[:6])[:2] == (6, 0x0627), "as QEMU's own"
    assert select(rig, Select.PROP_BITS) == b""
    keys = int.from_bytes(select(rig, Select.EV_BITS, EventType.KEY), "little")
    assert keys >> Key.KEY_ENTER & 1
    assert not keys & 1
    assert select(rig, Select.EV_BITS, EventType.LED) == b"\x07"
    assert select(rig, Select.EV_BITS, EventType.REP) == b"\x03"
    assert select(rig, Select.EV_BITS, EventType.REL) == b""


def test_what_a_touch_screen_tells() -> None:
    with Stepped(lambda loop: InputBackend("t", loop, "touch")) as target, Rig(target, 2, size=64) as rig:
        assert select(rig, Select.PROP_BITS) == b"\x02"
        assert ABS_INFO.unpack(select(rig, Select.ABS_INFO, Abs.X)) == (0, 32767, 0, 0, 0)
        assert ABS_INFO.unpack(select(rig, Select.ABS_INFO, Abs.MT_SLOT))[:2] == (0, 9)
        assert ABS_INFO.unpack(select(rig, Select.ABS_INFO, Abs.MT_TRACKING_ID))[:2] == (0, 65535)
        assert select(rig, Select.ABS_INFO, 0x3F) == b""


def test_a_whole_config_written_at_once(rig: Rig) -> None:
    rig.frontend.set_config(0, bytes((Select.ID_NAME, 0)) + bytes(134))
    assert rig.frontend.get_config(0, CONFIG_BYTES)[8:13] == b"RayOS"


def test_bits_are_as_short_as_can_be() -> None:
    assert pack_bits(frozenset()) == b""
    assert pack_bits(frozenset((0, 9))) == b"\x01\x02"


def test_what_is_told_is_what_may_be_injected() -> None:
    for kind in KINDS.values():
        for event_type in (EventType.KEY, EventType.REL, EventType.ABS):
            for code in kind.bits.get(event_type, ()):
                assert kind.check((event_type, code, 1)) == (event_type, code, 1)


# -- injection -------------------------------------------------------------------------------------------------------


def test_events_arrive_with_one_call(rig: Rig, target: Stepped[InputBackend]) -> None:
    buffers = Buffers(rig)
    buffers.offer(16)
    rig.settle()
    rig.queues[0].was_called()
    calls = target.backend.queues[0].calls
    assert target.backend.inject(PRESS) == 0
    assert buffers.events() == PRESS
    assert target.backend.queues[0].calls == calls + 1


def test_a_report_is_ended_for_who_forgets(rig: Rig, target: Stepped[InputBackend]) -> None:
    buffers = Buffers(rig)
    buffers.offer(8)
    target.backend.inject(PRESS[:1])
    assert buffers.events() == PRESS[:2]


def test_events_wait_for_buffers(rig: Rig, target: Stepped[InputBackend]) -> None:
    target.backend.inject(PRESS)
    buffers = Buffers(rig)
    buffers.offer(3)
    assert buffers.events() == PRESS[:3]
    assert target.backend.snapshot()["waiting_events"] == 1
    buffers.offer(3)
    assert buffers.events() == PRESS[3:]


def test_events_wait_for_a_driver(target: Stepped[InputBackend]) -> None:
    """Injected before there is a guest, delivered when it comes."""
    target.backend.inject(PRESS)
    with Rig(target, 2, size=64) as rig:
        buffers = Buffers(rig)
        buffers.offer(8)
        assert buffers.events() == PRESS


def test_a_fast_guest_sees_every_step() -> None:
    """Motion is merged only when the guest has no buffers."""
    way = [event for x in range(1, 6) for event in ((EventType.REL, Rel.X, x), SYN)]
    with Stepped(lambda loop: InputBackend("m", loop, "mouse")) as target, Rig(target, 2, size=64) as rig:
        buffers = Buffers(rig)
        buffers.offer(20)
        rig.settle()
        target.backend.inject(way)
        assert buffers.events() == way


def test_a_full_queue_counts_what_it_drops(target: Stepped[InputBackend]) -> None:
    presses = [event for key in range(2, 42) for event in ((EventType.KEY, key, 1), SYN)]
    dropped = target.backend.inject(presses)
    assert dropped == 40 - 16, "16 presses and the room of 16 releases are 64"
    assert target.backend.snapshot()["denials"] == {"queue_full": dropped}


def test_an_offer_takes_what_fits_and_says_how_much(rig: Rig, target: Stepped[InputBackend]) -> None:
    """Back-pressure in place of dropping: a long text arrives whole."""
    keyboard = target.backend
    text = PRESS * 50
    rooms: list[bool] = []
    keyboard.on_room = lambda: rooms.append(True)
    done = keyboard.offer(text, token=1)
    assert done == 64
    assert keyboard.offer(text, token=1) == done
    assert keyboard.offer(text[done:], token=2) == 0
    assert not rooms
    buffers = Buffers(rig)
    got: list[Event] = []
    for token in range(2, 99):
        buffers.offer(16)
        got += buffers.events()
        done += keyboard.offer(text[done:], token=token)
        if len(got) == len(text):
            break
    assert got == text
    assert rooms
    assert "queue_full" not in keyboard.snapshot()["denials"]


def test_an_injection_asked_again_is_done_once(rig: Rig, target: Stepped[InputBackend]) -> None:
    buffers = Buffers(rig)
    buffers.offer(20)
    for _ in range(3):
        assert target.backend.inject(PRESS, token=5) == 0
    assert buffers.events() == PRESS


@pytest.mark.parametrize("event", [(3, 0, 1), (1, 0x110, 1), (1, 30, 3), (17, 0, 1), (0, 1, 0), (1, 2)])
def test_what_a_keyboard_cannot_do_is_refused_whole(
    target: Stepped[InputBackend], event: tuple[int, ...]
) -> None:
    with pytest.raises(RequestError):
        target.backend.inject([*PRESS, event])
    assert target.backend.snapshot()["waiting_events"] == 0
    assert target.backend.snapshot()["denials"] == {"invalid": 1}


def test_the_gate_is_asked(rig: Rig) -> None:
    with Stepped(
        lambda loop: InputBackend(
            "k", loop, "keyboard", gate=Gate(allowed=EVERYTHING & ~(1 << Op.INPUT_INJECT.index))
        )
    ) as target:
        with pytest.raises(RequestError, match="4 events for the keyboard refused: capability"):
            target.backend.inject(PRESS)


def test_a_guest_that_may_not_poll_gets_nothing_and_loses_nothing() -> None:
    page = memoryview(array("Q", [EVERYTHING & ~(1 << Op.INPUT_POLL.index)])).cast("B")
    gate = Gate(page)
    with Stepped(lambda loop: InputBackend("k", loop, "keyboard", gate=gate)) as target:
        with Rig(target, 2, size=64) as rig:
            buffers = Buffers(rig)
            buffers.offer(8)
            target.backend.inject(PRESS)
            assert buffers.events() == []
            page.cast("Q")[0] = EVERYTHING
            buffers.offer(1)
            rig.queues[0].kick(always=True)
            assert buffers.events() == PRESS


@pytest.mark.parametrize("limit", [7, MAX_QUEUE_LIMIT + 1])
def test_a_queue_limit_that_cannot_work_is_refused(limit: int) -> None:
    loop = Loop()
    with pytest.raises(ConfigurationError, match=f"{limit} events: 8 to 1024"):
        InputBackend("k", loop, "keyboard", queue_limit=limit)
    loop.close()


def test_the_state_fits_its_store() -> None:
    loop = Loop()
    mouse = InputBackend("m", loop, "mouse", queue_limit=MAX_QUEUE_LIMIT)
    for code in (Button.BTN_LEFT, Button.BTN_RIGHT) * 600:
        mouse.inject([(EventType.KEY, code, 1)])
    assert len(mouse.pack_state()) <= InputBackend.STATE_BYTES
    loop.close()


# -- the guest's word ------------------------------------------------------------------------------------------------


def test_lights(rig: Rig, target: Stepped[InputBackend]) -> None:
    said: list[Event] = []
    target.backend.on_status = lambda *event: said.append(event)
    for led, value in ((Led.NUM, 1), (Led.CAPS, 1), (Led.NUM, 0)):
        assert rig.request(struct.pack("<HHI", EventType.LED, led, value), index=1) == b""
    assert target.backend.leds == 1 << Led.CAPS
    assert target.backend.snapshot()["leds"] == ["caps"]
    assert said == [(EventType.LED, Led.NUM, 1), (EventType.LED, Led.CAPS, 1), (EventType.LED, Led.NUM, 0)]


def test_a_new_session_has_nothing_of_the_old(rig: Rig, target: Stepped[InputBackend]) -> None:
    target.backend.inject(PRESS[:2])
    rig.request(struct.pack("<HHI", EventType.LED, Led.NUM, 1), index=1)
    rig.frontend.close()
    target.settle()
    snapshot = target.backend.snapshot()
    assert (snapshot["waiting_events"], snapshot["leds"]) == (0, [])

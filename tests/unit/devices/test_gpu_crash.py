"""The GPU's worker is killed between any two steps: the successor knows exactly what the driver was told.

A kill is an exception out of the state store; what the dead backend held in Python is never looked at again.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_devices.errors import ConfigurationError
from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.gpu.commands import CONTROL, CURSOR
from rayos_devices.gpu.wire import Command, Header, Rect, ResourceId, TransferToHost2d, UpdateCursor
from rayos_devices.loop import Loop
from rayos_devices.state import NO_QUEUE, StateStore
from tests.framework.gpu import OK, GpuGuest


class Killed(BaseException):
    """kill -9."""


class MortalStore:
    """A state store in whose `moment` the process dies, at the `countdown`th change."""

    def __init__(self, store: StateStore, moment: str, countdown: int = 0) -> None:
        self.store = store
        self._moment = moment
        self._countdown = countdown
        self.capacity_bytes = store.capacity_bytes

    def save(self, payload: bytes, queue: int = NO_QUEUE, used_index: int = 0) -> None:
        self._die("before save")
        self.store.save(payload, queue, used_index)
        self._die("before publish")

    def commit(self) -> None:
        self._die("before commit")
        self.store.commit()
        self._die("before free")

    def _die(self, moment: str) -> None:
        if moment == self._moment:
            if self._countdown == 0:
                raise Killed
            self._countdown -= 1


MOMENTS = ("before save", "before publish", "before commit", "before free")


def arm(guest: GpuGuest, moment: str, countdown: int = 0) -> None:
    backend = guest.backend
    backend._state = MortalStore(backend._state, moment, countdown)  # type: ignore[assignment]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("command", ["create", "unref", "attach", "detach", "scanout"])
def test_each_change_is_done_once(moment: str, command: str) -> None:
    """Wherever the kill falls, the command is answered OK once, and its effect is there once."""
    with GpuGuest() as guest:
        backing = guest.show(1, 64, 48)
        guest.draw(1, Rect(0, 0, 64, 48), b"\x5a" * 64 * 48 * 4, backing, 256)
        assert guest.create(2, 64, 48) == OK
        arm(guest, moment)
        steps = {
            "create": lambda: guest.create(3, 8, 8),
            "unref": lambda: guest.unref(2),
            "attach": lambda: guest.attach(2, [(backing, 64 * 48 * 4)]),
            "detach": lambda: guest.detach(1),
            "scanout": lambda: guest.set_scanout(0, 1, Rect(0, 0, 32, 24)),
        }
        with pytest.raises(Killed):
            steps[command]()
        guest.crash()
        ((_, written),) = guest.rig.wait_used()
        assert written == 24
        pages = {
            "create": 3 + 3 + 1 + 1,
            "unref": 3 + 1,
            "attach": 3 + 3 + 2,
            "detach": 3 + 3,
            "scanout": 3 + 3 + 1,
        }
        assert guest.backend.heap.used_bytes == pages[command] * 4096
        frame = guest.backend.frame()
        assert (frame.width, frame.height) == ((32, 24) if command == "scanout" else (64, 48))
        assert set(frame.pixels) == {0x5A}
        if command == "detach":
            assert guest.attach(1, [(backing, 64 * 48 * 4)]) == OK
        guest.draw(1, Rect(0, 0, 64, 48), b"\x77" * 64 * 48 * 4, backing, 256)
        assert set(guest.backend.frame().pixels) == {0x77}


def test_what_is_dropped_lives_until_the_drop_is_saved() -> None:
    """A picture whose UNREF never came to be is still shown."""
    with GpuGuest() as guest:
        backing = guest.show(1, 64, 48)
        guest.draw(1, Rect(0, 0, 64, 48), b"\x5a" * 64 * 48 * 4, backing, 256)
        arm(guest, "before save")
        with pytest.raises(Killed):
            guest.unref(1)
        guest.crash(())
        assert set(guest.backend.frame().pixels) == {0x5A}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_batch_is_replayed_from_its_first_unpublished_command(moment: str) -> None:
    """TRANSFER and DETACH in one batch, killed at the DETACH: the TRANSFER still finds its pages."""
    with GpuGuest() as guest:
        backing = guest.show(1, 64, 48)
        guest.ram.write(backing, b"\x21" * 64 * 48 * 4)
        commands = [
            Header(Command.TRANSFER_TO_HOST_2D).pack() + TransferToHost2d(Rect(0, 0, 64, 48), 0, 1).pack(),
            Header(Command.RESOURCE_DETACH_BACKING).pack() + ResourceId(1).pack(),
        ]
        rooms = [guest.ram.allocate(24) for _ in commands]
        queue = guest.rig.queues[CONTROL]
        queue.offer(
            [
                queue.add([(guest.ram.put(data), len(data))], [(room, 24)])
                for data, room in zip(commands, rooms, strict=True)
            ]
        )
        arm(guest, moment)
        queue.kick()
        with pytest.raises(Killed):
            guest.rig.settle()
        guest.crash()
        assert len(guest.rig.wait_used(count=2)) == 2
        assert [Header.unpack(guest.ram.read(room, 24)).kind for room in rooms] == [OK, OK]
        assert set(guest.backend.frame().pixels) == {0x21}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("queues", [(CONTROL, CURSOR), (CURSOR, CONTROL)])
def test_a_cursor_change_waits_for_its_queue(moment: str, queues: tuple[int, int]) -> None:
    """The state's truth hangs on the cursor queue; the control queue may be resumed before it."""
    with GpuGuest() as guest:
        assert guest.create(1, 64, 64) == OK
        arm(guest, moment)
        with pytest.raises(Killed):
            guest.cursor(Command.UPDATE_CURSOR, UpdateCursor(0, 7, 8, 1, 2, 3))
        guest.crash(queues)
        ((_, written),) = guest.rig.wait_used(CURSOR)
        assert written == 24
        cursor = guest.backend.cursor()
        assert cursor is not None and (cursor.x, cursor.y, cursor.hot_x, cursor.hot_y) == (7, 8, 2, 3)
        assert guest.create(2, 8, 8) == OK


def test_a_command_waits_while_the_state_is_unknown() -> None:
    """A control command that is there before the cursor queue is resumed is done after it."""
    with GpuGuest() as guest:
        assert guest.create(1, 64, 64) == OK
        arm(guest, "before publish")
        with pytest.raises(Killed):
            guest.cursor(Command.MOVE_CURSOR, UpdateCursor(0, 7, 8, 0, 0, 0))
        guest.crash([CONTROL])
        with pytest.raises(TimeoutError):
            guest.rig.target.settle()
            guest.rig.queues[CONTROL].submit([(guest.ram.put(bytes(24)), 24)], [(guest.ram.allocate(24), 24)])
            guest.rig.wait_used(timeout=0.05)
        guest.rig.frontend.start(CURSOR, guest.rig.queues[CURSOR])
        assert len(guest.rig.wait_used(CONTROL)) == len(guest.rig.wait_used(CURSOR)) == 1


def test_a_reset_that_the_predecessor_never_saw() -> None:
    """Killed, and the guest begins anew before the successor runs: the old resources are gone."""
    with GpuGuest() as guest:
        guest.show(1, 64, 48)
        for queue in guest.rig.queues:
            queue.reset()
        guest.crash()
        guest.rig.settle()
        assert guest.backend.heap.used_bytes == 0
        assert guest.create(1, 64, 48) == OK


def test_the_display_goes_on_under_the_successor() -> None:
    """The same socket, the whole picture again, serials that only rise."""
    with GpuGuest() as guest, guest.monitor() as monitor:
        backing = guest.show(1, 64, 48)
        guest.draw(1, Rect(0, 0, 64, 48), b"\x5a" * 64 * 48 * 4, backing, 256)
        monitor.follow(guest)
        before = guest.backend.frame()
        display = guest.backend.screen.display
        assert display._socket is not None
        fd = display._socket.dup().detach()
        monitor.surfaces[0] = None
        guest.crash()
        assert guest.backend.take_gpu_socket(fd)
        monitor.follow(guest)
        after = guest.backend.frame()
        assert monitor.picture() == after.pixels == before.pixels and after.serial > before.serial
        guest.crash()
        assert guest.backend.frame().serial > after.serial


@pytest.mark.parametrize("changed", [{"scanouts": 2}, {"quota_bytes": 4096}])
def test_a_successor_must_be_made_like_its_predecessor(changed: dict[str, int]) -> None:
    """Other arguments are refused with a sentence, instead of reading another device's memory."""
    with GpuGuest() as guest:
        guest.show(1, 64, 48)
        loop = Loop()
        state = StateStore(guest.state_fd, GpuBackend.STATE_BYTES)
        with pytest.raises(ConfigurationError, match="does not fit"):
            GpuBackend("gpu", loop, heap_fd=guest.heap_fd, state=state, **{**guest.options, **changed})  # type: ignore[arg-type]
        loop.close()


_STEP = st.tuples(st.sampled_from(["create", "unref", "attach", "detach", "scanout"]), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(_STEP, min_size=1, max_size=14),
    kills=st.dictionaries(st.integers(0, 13), st.sampled_from(MOMENTS), max_size=5),
)
def test_kills_change_nothing(steps: list[tuple[str, int]], kills: dict[int, str]) -> None:
    """Any commands with any kills: answers, table and memory are those of a run without kills."""

    def run(guest: GpuGuest, kills: dict[int, str]) -> list[object]:
        log: list[object] = []
        page = guest.ram.allocate(4096, 4096)
        guest.keep()
        for number, (name, resource) in enumerate(steps):
            act: Callable[[], object] = {
                "create": lambda r=resource: guest.create(r, 16 * r, 32),
                "unref": lambda r=resource: guest.unref(r),
                "attach": lambda r=resource: guest.attach(r, [(page, 4096)]),
                "detach": lambda r=resource: guest.detach(r),
                "scanout": lambda r=resource: guest.set_scanout(0, r, Rect(0, 0, 16 * r, 32)),
            }[name]
            if number in kills:
                arm(guest, kills[number])
            try:
                log.append(act())
                guest.backend._state = getattr(
                    guest.backend._state, "store", guest.backend._state
                )  # survived
            except Killed:
                guest.crash()
                guest.rig.wait_used()
                log.append(OK)
            log.append((guest.backend.heap.used_bytes, sorted(guest.backend._table._resources)))
            frame = guest.backend.frame()
            log.append((frame.width, frame.height))
        return log

    with GpuGuest() as plain, GpuGuest() as killed:
        assert run(plain, {}) == run(killed, kills)


def test_a_mode_is_not_set_on_a_state_that_is_not_known_yet() -> None:
    """A resize before the ring has told which state is true is asked for again; nothing of the predecessor is lost."""
    with GpuGuest() as guest:
        backing = guest.show(1, 64, 48)
        guest.draw(1, Rect(0, 0, 64, 48), b"\x5a" * 64 * 48 * 4, backing, 256)
        arm(guest, "before publish")
        with pytest.raises(Killed):
            guest.create(2, 8, 8)
        guest.crash(())
        told: list[int] = []
        guest.backend.on_damage = told.append
        assert not guest.backend.resize(0, 800, 600) and not told
        guest.rig.frontend.start(CONTROL, guest.rig.queues[CONTROL])
        guest.rig.settle()
        assert told and guest.backend.resize(0, 800, 600)
        guest.crash()
        assert set(guest.backend.frame().pixels) == {0x5A}
        assert guest.backend.screen.scanout(0).width == 800

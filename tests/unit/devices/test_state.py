"""Device state that outlives its worker: the used index is the commit point."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from rayos_devices.state import NO_QUEUE, StateStore

CAPACITY = 64


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("state")
    yield fd
    os.close(fd)


def published(_queue: int, _used: int) -> bool:
    return True


def unpublished(_queue: int, _used: int) -> bool:
    return False


def test_nothing_was_saved_at_the_first_start(fd: int) -> None:
    """None, from a fresh memfd and from private memory."""
    assert StateStore(fd, CAPACITY).load(published) is None
    assert StateStore(None, CAPACITY).load(published) is None


def test_the_file_grows_to_two_slots_and_never_shrinks(fd: int) -> None:
    """A successor with the same capacity finds what its predecessor wrote."""
    StateStore(fd, CAPACITY)
    size = os.fstat(fd).st_size
    assert size >= 2 * CAPACITY
    StateStore(fd, CAPACITY)
    assert os.fstat(fd).st_size == size


def test_a_state_without_a_queue_holds_at_once(fd: int) -> None:
    """Nothing is asked of the rings."""
    StateStore(fd, CAPACITY).save(b"one")
    assert StateStore(fd, CAPACITY).load(unpublished) == b"one"


def test_a_state_waits_for_its_used_index(fd: int) -> None:
    """Published: the new state; not published: the one before, since the chain is handled again."""
    store = StateStore(fd, CAPACITY)
    store.save(b"before")
    store.save(b"after", 3, 77)
    asked: list[tuple[int, int]] = []

    def is_published(queue: int, used: int) -> bool:
        asked.append((queue, used))
        return False

    assert StateStore(fd, CAPACITY).load(is_published) == b"before"
    assert asked == [(3, 77)]


def test_a_published_state_is_true_without_the_commit_mark(fd: int) -> None:
    """Killed between the publish and `commit`."""
    store = StateStore(fd, CAPACITY)
    store.save(b"before")
    store.save(b"after", 3, 77)
    assert StateStore(fd, CAPACITY).load(published) == b"after"


def test_a_committed_state_asks_no_ring(fd: int) -> None:
    """The used index goes on, and may be reset, afterwards."""
    store = StateStore(fd, CAPACITY)
    store.save(b"before")
    store.save(b"after", 0, 1)
    store.commit()
    assert StateStore(fd, CAPACITY).load(unpublished) == b"after"


def test_a_successor_goes_on_where_the_true_state_was(fd: int) -> None:
    """The state that never became true is overwritten, also after several deaths in a row."""
    StateStore(fd, CAPACITY).save(b"true")
    for attempt in range(4):
        successor = StateStore(fd, CAPACITY)
        assert successor.load(unpublished) == b"true"
        successor.save(b"try %d" % attempt, 0, attempt)
    successor = StateStore(fd, CAPACITY)
    assert successor.load(unpublished) == b"true"
    successor.save(b"done", 0, 9)
    successor.commit()
    assert StateStore(fd, CAPACITY).load(unpublished) == b"done"


def test_a_state_that_was_loaded_as_published_stays_true(fd: int) -> None:
    """The successor commits what it found true: the guest may reset the queue before the next save."""
    store = StateStore(fd, CAPACITY)
    store.save(b"before")
    store.save(b"after", 0, 1)
    assert StateStore(fd, CAPACITY).load(published) == b"after"
    assert StateStore(fd, CAPACITY).load(unpublished) == b"after"


@pytest.mark.parametrize("size", [0, 1, CAPACITY])
def test_any_size_up_to_the_capacity_fits(fd: int, size: int) -> None:
    """Also shorter after longer."""
    store = StateStore(fd, CAPACITY)
    for _ in range(3):
        store.save(b"x" * CAPACITY)
    store.save(b"y" * size)
    assert StateStore(fd, CAPACITY).load(unpublished) == b"y" * size


def test_a_state_beyond_the_capacity_is_our_bug(fd: int) -> None:
    """ValueError, and what was saved stays."""
    store = StateStore(fd, CAPACITY)
    store.save(b"kept")
    with pytest.raises(ValueError, match=f"{CAPACITY + 1} bytes exceeds {CAPACITY}"):
        store.save(bytes(CAPACITY + 1))
    assert StateStore(fd, CAPACITY).load(unpublished) == b"kept"


def test_a_damaged_slot_is_a_slot_that_never_was(fd: int) -> None:
    """Any flipped bit of header or payload; the other slot is the truth."""
    store = StateStore(fd, CAPACITY)
    store.save(b"older", NO_QUEUE)
    clean = os.pread(fd, 4096, 0)
    store.save(b"newer", NO_QUEUE)
    changed = [i for i, (a, b) in enumerate(zip(clean, os.pread(fd, 4096, 0), strict=True)) if a != b]
    for position in range(changed[0], changed[-1] + 1):
        (byte,) = os.pread(fd, 1, position)
        for bit in range(8):
            os.pwrite(fd, bytes([byte ^ 1 << bit]), position)
            assert StateStore(fd, CAPACITY).load(published) in (b"older", b"newer")
        os.pwrite(fd, bytes([byte]), position)
    os.pwrite(fd, bytes([os.pread(fd, 1, changed[-1])[0] ^ 1]), changed[-1])

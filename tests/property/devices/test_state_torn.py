"""kill -9 between any two bytes of a save: the state that was true is still the truth."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_devices.state import NO_QUEUE, StateStore

CAPACITY = 24


class Dying(Exception):
    """Stands for SIGKILL."""


class Memory:
    """Shared memory of which only the first `budget` bytes ever written arrive; `whole` stores are not torn."""

    def __init__(self, inner: mmap.mmap, budget: int) -> None:
        self.inner, self.budget = inner, budget

    def __getitem__(self, key: Any) -> Any:
        return self.inner[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, int):
            key, value = slice(key, key + 1), bytes([value])
        take = min(self.budget, len(value))
        self.inner[key.start : key.start + take] = value[:take]
        self.budget -= take
        if take < len(value) or self.budget == 0:
            raise Dying


@contextmanager
def shared() -> Iterator[int]:
    fd = os.memfd_create("state")
    try:
        yield fd
    finally:
        os.close(fd)


STATE = st.binary(max_size=CAPACITY)


@settings(max_examples=300, deadline=None)
@given(
    history=st.lists(STATE, min_size=0, max_size=4),
    torn=STATE,
    budget=st.integers(1, 80),
    queue=st.sampled_from([NO_QUEUE, 0, 7]),
    used=st.integers(0, 65535),
)
def test_a_torn_save_never_was(history: list[bytes], torn: bytes, budget: int, queue: int, used: int) -> None:
    """Wherever it is cut: the state before it, or (whole) the new one; a successor can go on saving."""
    with shared() as fd:
        store = StateStore(fd, CAPACITY)
        for turn, state in enumerate(history):
            store.save(state, 0, turn)
            store.commit()
        real = store._map
        store._map = Memory(real, budget)  # type: ignore[assignment]
        is_whole = True
        try:
            store.save(torn, queue, used)
        except Dying:
            is_whole = False
        store._map = real
        before = history[-1] if history else None
        for is_published in (False, True):
            copy = os.memfd_create("copy")
            os.pwrite(copy, os.pread(fd, 4096, 0), 0)
            found = StateStore(copy, CAPACITY).load(lambda _queue, _used, answer=is_published: answer)  # type: ignore[misc]
            holds = queue == NO_QUEUE or is_published
            if is_whole:
                assert found == (torn if holds else before)
            else:
                assert found in ((before, torn) if holds else (before,))
            successor = StateStore(copy, CAPACITY)
            successor.load(lambda _queue, _used: False)
            successor.save(b"next", 0, 1)
            assert StateStore(copy, CAPACITY).load(lambda _queue, _used: True) == b"next"
            os.close(copy)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(
        st.tuples(STATE, st.sampled_from(["save", "publish", "commit", "die after all"])), max_size=12
    )
)
def test_the_truth_follows_the_used_index(steps: list[tuple[bytes, str]]) -> None:
    """A worker that dies after the save, the publish or the commit of each step, against a one-line model."""
    with shared() as fd:
        truth: bytes | None = None
        published = [0]

        def is_published(_queue: int, used: int) -> bool:
            return used <= published[0]

        store = StateStore(fd, CAPACITY)
        for state, death in steps:
            store.save(state, 0, published[0] + 1)
            if death != "save":
                published[0] += 1
                truth = state
            if death in ("commit", "die after all"):
                store.commit()
            if death != "commit":
                store = StateStore(fd, CAPACITY)
                assert store.load(is_published) == truth
        assert StateStore(fd, CAPACITY).load(is_published) == truth

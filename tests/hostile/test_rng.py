"""A hostile guest and the entropy device: row E1. Rows V1 to V15 stand in test_ring.py, for every device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rayos_devices.backend import Backend
from rayos_devices.rng.backend import MAX_REQUEST_BYTES
from rayos_vmm.shared.spec import Device
from tests.framework.hostile import DEVICES, honest_rng, wait_for
from tests.framework.kept import Kept, Link
from tests.framework.target import Rig, Served, Stepped


@pytest.fixture
def device() -> object:
    return DEVICES["rng"]


@pytest.fixture
def rig(target: Stepped[Backend] | Served) -> Iterator[Rig]:
    with Rig(target, 1, size=64) as rig:
        yield rig
        honest_rng(rig)


def test_E1_a_buffer_of_nothing_comes_back(rig: Rig) -> None:
    """Nothing to write, or only what the device may read: counted, and the next is served."""
    assert rig.request(bytes(64)) == b""
    assert len(rig.request(bytes(64), 32)) == 32


def test_E1_megabytes_are_not_asked_of_the_host(rig: Rig) -> None:
    """The length is the driver's word, the answer is at most 4 KiB."""
    assert len(rig.request(b"", 1 << 20)) == MAX_REQUEST_BYTES


def test_E1_a_flood_is_answered_in_its_order(rig: Rig) -> None:
    """Sixty requests at once, each once."""
    queue = rig.queues[0]
    heads = [queue.submit([], [(rig.ram.allocate(256), 256)]) for _ in range(60)]
    done: list[tuple[int, int]] = []

    def all_there() -> bool:
        done.extend(queue.collect())
        return len(done) >= len(heads)

    assert wait_for(rig, all_there)
    assert done == [(head, 256) for head in heads]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_E1_a_worker_that_is_killed_answers_each_request_once(packed: bool, tmp_path: Path) -> None:
    """Its successor goes on in the ring: no buffer is lost, none comes twice, none is empty."""
    with Kept(tmp_path, [Device(kind="rng", name="rng", packed=True)]) as kept:
        kept.status()
        with Rig(Link(kept, "rng"), 1, size=64, packed=packed) as rig:
            for _ in range(10):
                honest_rng(rig)
                queue = rig.queues[0]
                heads = [queue.submit([], [(rig.ram.allocate(64), 64)]) for _ in range(8)]
                kept.ask("kill_worker")
                done: list[tuple[int, int]] = []

                def all_there(done: list[tuple[int, int]] = done, heads: list[int] = heads) -> bool:
                    done.extend(rig.queues[0].collect())
                    return len(done) >= len(heads)

                assert wait_for(rig, all_there)
                assert sorted(done) == sorted((head, 64) for head in heads)
                rig.ram.rewind(rig.heap)

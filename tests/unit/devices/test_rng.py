"""The entropy device: every buffer is filled or waits; nothing is answered twice, and never with nothing."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import pytest

from rayos_devices.errors import ConfigurationError
from rayos_devices.gate import EVERYTHING, Denial, Gate, Op
from rayos_devices.limits import Limit
from rayos_devices.rng.backend import MAX_REQUEST_BYTES, RngBackend
from tests.framework.hostile import honest_rng, offering_packed
from tests.framework.target import Rig, Stepped

CLOSED = EVERYTHING & ~(1 << Op.RNG_READ.index)


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def rig(request: pytest.FixtureRequest) -> Iterator[tuple[Rig, RngBackend]]:
    with (
        Stepped(lambda loop: offering_packed(RngBackend("rng", loop))) as target,
        Rig(target, 1, packed=request.param) as rig,
    ):
        yield rig, target.backend


def offer(rig: Rig, size: int) -> int:
    address = rig.ram.allocate(size)
    head = rig.queues[0].submit([], [(address, size)])
    rig.settle()
    return head


def test_a_buffer_is_filled_up_to_the_bound(rig: tuple[Rig, RngBackend]) -> None:
    """No two are alike, and a large one gets a part of it, which the driver may ask for again (5.4.6)."""
    driver, backend = rig
    assert driver.request(b"", 32) != driver.request(b"", 32)
    assert len(driver.request(b"", 1)) == 1
    assert len(driver.request(b"", 3 * MAX_REQUEST_BYTES)) == MAX_REQUEST_BYTES
    counted = backend.stats.snapshot()["operations"]["rng.read"]
    assert (counted["allowed"], counted["bytes"]) == (4, 65 + MAX_REQUEST_BYTES)


def test_a_refused_request_waits_for_the_right() -> None:
    """A device must not answer with nothing (5.4.6.2): the buffer stays the device's until the gate opens."""
    page = array("Q", [CLOSED])
    gate = Gate(memoryview(page).cast("B"))
    with Stepped(lambda loop: RngBackend("rng", loop, gate=gate)) as target, Rig(target, 1) as rig:
        head = offer(rig, 16)
        assert rig.queues[0].collect() == [] and target.backend.depth == 1
        assert target.backend.stats.snapshot()["denials"] == {Denial.CAPABILITY.value: 1}
        page[0] = EVERYTHING
        assert rig.wait_used(0) == [(head, 16)]
        assert target.backend.depth == 0


def test_a_rate_is_kept_and_can_be_changed_while_requests_wait() -> None:
    """4 KiB at once and 1 B a second afterwards; unbounded again, the rest comes at once."""
    make = lambda loop: RngBackend("rng", loop, rate_bytes_per_second=1.0)  # noqa: E731
    with Stepped(make) as target, Rig(target, 1) as rig:
        assert target.backend.limit(Limit.RATE) == 1
        honest_rng(rig)
        while not target.backend.depth:
            offer(rig, MAX_REQUEST_BYTES)
        rig.queues[0].collect()
        waiting = offer(rig, 8)
        assert rig.queues[0].collect() == []
        target.backend.change_limit(Limit.RATE, 0)
        rig.settle()
        assert (waiting, 8) in rig.queues[0].collect()


def test_a_queue_that_stops_leaves_no_timer() -> None:
    """A timer of a stopped queue would find memory that is gone."""
    gate = Gate(allowed=CLOSED)
    with Stepped(lambda loop: RngBackend("rng", loop, gate=gate)) as target, Rig(target, 1) as rig:
        offer(rig, 16)
        assert target.backend.depth == 1
        target.backend.stop_queue(0)
        assert target.backend.depth == 0


def test_a_negative_rate_is_refused() -> None:
    with (
        pytest.raises(ConfigurationError, match="a rate of -1 bytes a second"),
        Stepped(lambda loop: RngBackend("rng", loop, rate_bytes_per_second=-1.0)),
    ):
        pass

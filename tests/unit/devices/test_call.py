"""A call or error descriptor that is replaced under a live queue: whoever listens there may have missed one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayos_devices.backend import Backend
from rayos_devices.serve import build_all, parser
from rayos_devices.vhost_user.message import U64, FrontendRequest
from tests.framework.driver import DriverQueue
from tests.framework.echo import EchoBackend
from tests.framework.target import Rig, Stepped

KINDS = {"blk": ["--image", "DISK"], "net": ["--echo"], "gpu": [], "input": [], "console": [], "rng": []}


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def value(event: int) -> int:
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_live_queue_of_every_kind_calls_its_new_descriptor_once(
    kind: str, packed: bool, event: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """QEMU starts a queue before it tells the driver's vector, and throws away what was called until then."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    arguments = [str(disk) if one == "DISK" else one for one in KINDS[kind]]
    options = parser().parse_args([kind, "--socket", "/nowhere", *arguments])
    with Stepped[Backend](lambda loop: build_all(options, loop)[0][1]) as target:
        if packed:
            journals = [memoryview(bytearray(8 * 1025)).cast("Q") for _ in target.backend.queues]
            target.backend.offer_packed(journals)
        with Rig(target, len(target.backend.queues), packed=packed) as rig:
            rig.settle()
            for index in range(len(rig.queues)):
                value(event)
                rig.frontend.tell(FrontendRequest.SET_VRING_CALL, U64.pack(index), [event])
                assert value(event) == 1, f"queue {index}"
                rig.settle()
                assert value(event) == 0


def test_a_queue_that_is_not_live_calls_nobody(event: int) -> None:
    """Its driver has not made it yet, or has given it up."""
    with Stepped(EchoBackend) as target, Rig(target, 1) as rig:
        rig.frontend.tell(FrontendRequest.SET_VRING_CALL, U64.pack(1), [event])
        assert value(event) == 0
        rig.frontend.stop(0)
        rig.frontend.tell(FrontendRequest.SET_VRING_CALL, U64.pack(0), [event])
        assert value(event) == 0


def test_what_was_used_before_the_descriptor_came_is_heard_of(event: int) -> None:
    """The call of a chain went to the descriptor before; the one after it is told by event index or not at all."""
    with Stepped(EchoBackend) as target, Rig(target, 1) as rig:
        queue: DriverQueue = rig.queues[0]
        queue.submit((), [(rig.ram.allocate(4), 4)])
        rig.settle()
        assert queue.was_called()
        rig.frontend.tell(FrontendRequest.SET_VRING_CALL, U64.pack(0), [event])
        assert value(event) == 1
        assert len(queue.collect()) == 1


def test_a_broken_queue_tells_its_new_error_descriptor(event: int) -> None:
    """And a sound one does not."""
    with Stepped(EchoBackend) as target, Rig(target, 1) as rig:
        rig.frontend.tell(FrontendRequest.SET_VRING_ERR, U64.pack(0), [event])
        assert value(event) == 0
        rig.queues[0].offer([5000])
        rig.queues[0].kick()
        rig.settle()
        assert target.backend.queues[0].broken
        assert value(event) == 1
        fresh = os.eventfd(0, os.EFD_NONBLOCK)
        rig.frontend.tell(FrontendRequest.SET_VRING_ERR, U64.pack(0), [fresh])
        assert value(fresh) == 1
        os.close(fresh)

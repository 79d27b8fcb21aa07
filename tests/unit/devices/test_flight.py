"""Requests on their way to the disk: any end, one order; direct images; and what happens without io_uring."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import rayos_devices.blk.backend
from rayos_devices.blk.backend import BlkBackend
from rayos_devices.blk.store import RawStore
from rayos_devices.loop import Loop
from rayos_devices.uring import Uring
from tests.framework.target import Rig, Stepped

BLOCK = 4096
BLOCKS = 64
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8


def content(block: int) -> bytes:
    return bytes([block + 1]) * BLOCK


@pytest.fixture
def image() -> Iterator[Path]:
    """On a disk: a tmpfs knows neither a cold page nor O_DIRECT."""
    with TemporaryDirectory(dir="/var/tmp", prefix="rayos-test-") as name:
        path = Path(name, "image")
        path.write_bytes(b"".join(map(content, range(BLOCKS))))
        yield path


def forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.fixture(params=["cached", "direct", "cached, no io_uring", "direct, no io_uring", "polling"])
def rig(request: pytest.FixtureRequest, image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    def refuse(_entries: int) -> Any:
        raise PermissionError(errno.EPERM, "not here")

    if "no io_uring" in request.param:
        monkeypatch.setattr(rayos_devices.blk.backend, "Uring", refuse)

    def make(loop: Loop) -> BlkBackend:
        store = RawStore(os.open(image, os.O_RDWR), is_direct=request.param.startswith("direct"))
        poll_ns = 50_000 if request.param == "polling" else 0
        return BlkBackend("blk", loop, store, serial="flight", poll_ns=poll_ns)

    with Stepped(make) as target:
        expected = "synchronous: no io_uring" if "no io_uring" in request.param else "io_uring"
        assert target.backend.snapshot()["io"].startswith(expected)
        with Rig(target) as rig:
            yield rig


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def test_requests_are_told_in_the_order_they_were_offered(rig: Rig, image: Path) -> None:
    """Cold and hot reads, writes, flushes and an id at once: the used ring repeats the avail ring."""
    forget(image)
    queue = rig.queues[0]
    heads, targets = [], []
    for turn in range(24):
        block = turn * 7 % BLOCKS
        kind = (IN, IN, OUT, FLUSH, IN, GET_ID)[turn % 6]
        data = header(kind, block * 8) + (content(block) if kind == OUT else b"")
        room = {IN: BLOCK + 1, GET_ID: 21}.get(kind, 1)
        source, target = rig.ram.put(data), rig.ram.allocate(room, 512)
        heads.append(queue.add([(source, len(data))], [(target, room)]))
        targets.append((kind, block, target, room))
    queue.offer(heads)
    queue.kick(always=True)
    entries = rig.wait_used(count=len(heads))
    assert [head for head, _ in entries] == heads
    for kind, block, target, room in targets:
        assert rig.ram.read(target + room - 1, 1) == b"\0"
        if kind == IN:
            assert rig.ram.read(target, BLOCK) == content(block)
        elif kind == GET_ID:
            assert rig.ram.read(target, 6) == b"flight"


@pytest.mark.parametrize("offset", [0, 16, 100])
def test_any_address_of_the_guest_will_do(rig: Rig, image: Path, offset: int) -> None:
    """O_DIRECT wants aligned memory; what is not goes by way of ours."""
    data = bytes(range(256)) * 6
    source = rig.ram.allocate(4096, 4096) + offset
    target = rig.ram.allocate(4096, 4096) + offset
    rig.ram.write(source, header(OUT, 3) + data)
    queue = rig.queues[0]
    queue.offer([queue.add([(source, 16 + len(data))], [(target, 1)])])
    queue.kick(always=True)
    rig.wait_used()
    rig.ram.write(source, header(IN, 3))
    queue.offer([queue.add([(source, 16)], [(target, len(data) + 1)])])
    queue.kick(always=True)
    assert rig.wait_used()[0][1] == len(data) + 1
    assert rig.ram.read(target, len(data) + 1) == data + b"\0"
    assert image.read_bytes()[3 * 512 : 3 * 512 + len(data)] == data


def test_a_queue_that_stops_has_nothing_on_its_way(rig: Rig, image: Path) -> None:
    """Everything offered is in the used ring when the frontend is told the position."""
    forget(image)
    queue = rig.queues[0]
    heads = []
    for block in range(BLOCKS // 2):
        source, target = rig.ram.put(header(IN, block * 16)), rig.ram.allocate(BLOCK + 1, 512)
        heads.append(queue.add([(source, 16)], [(target, BLOCK + 1)]))
    queue.offer(heads)
    queue.kick(always=True)
    rig.target.backend.run_queue(0)  # type: ignore[attr-defined]
    rig.target.backend.stop_queue(0)  # type: ignore[attr-defined]
    assert [head for head, _ in queue.collect()] == heads


def test_a_ring_of_ours_does_nothing_else() -> None:
    """The kernel refuses other operations (here: a send), whoever fills the entries."""
    uring = Uring(8)
    try:
        uring.prepare(26, 0, 0, 0, 0, 0, 7)
        uring.wait()
        assert uring.reap()
        assert (uring.user_data, uring.result) == (7, -errno.EACCES)
    finally:
        uring.close()

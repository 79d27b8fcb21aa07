"""Frontends that are not the service's own, against `rayos device serve`: a process alone, without a keeper."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayos_devices.vhost_user.message import U64, VRING_STATE, FrontendRequest
from tests.framework.frontend import ANSWER_TIMEOUT, Dropped, pack_memory_table
from tests.framework.guest_memory import GuestRam
from tests.framework.hostile import DEVICES, Device, image
from tests.framework.target import Rig, Served

PAGE = 4096
KINDS = ["blk", "net", "gpu", "input", "console", "rng"]
on_every_kind = pytest.mark.parametrize("device", [DEVICES[kind] for kind in KINDS], ids=KINDS)


@contextmanager
def alone(device: Device, directory: Path, *more: str | Path) -> Iterator[Served]:
    """The device as anybody starts it."""
    arguments: list[str | Path] = [device.name, *more]
    if device.name == "blk":
        arguments += ["--image", image(directory)]
    elif device.name == "net" and not more:
        arguments += ["--echo"]
    with Served(directory / "socket", arguments) as target:
        yield target


MEMORIES: dict[str, Callable[[Path], GuestRam]] = {
    "sealed": lambda _directory: GuestRam(),
    "a memfd without seals": lambda _directory: GuestRam(seal=False),
    "a file of tmpfs": lambda _directory: GuestRam(file=Path(f"/dev/shm/rayos-test-{os.getpid()}")),
    "a file on a disk": lambda directory: GuestRam(file=directory / "memory"),
}


@on_every_kind
def test_U5_any_memory_that_can_be_mapped_is_taken_by_a_device_alone(device: Device, tmp_path: Path) -> None:
    """DPDK, crosvm, Cloud Hypervisor, User Mode Linux and memory-backend-file have no seals."""
    with alone(device, tmp_path) as target:
        for make in MEMORIES.values():
            with make(tmp_path) as ram, Rig(target, device.queues, ram=ram) as rig:
                device.honest(rig)
            Path(f"/dev/shm/rayos-test-{os.getpid()}").unlink(missing_ok=True)


@on_every_kind
def test_U6_a_truncated_file_ends_its_session_and_nothing_else(device: Device, tmp_path: Path) -> None:
    """The access finds zeros, the session ends with a sentence, the process serves the next frontend."""
    with alone(device, tmp_path) as target:
        with GuestRam(seal=False) as ram, Rig(target, device.queues, ram=ram) as rig:
            device.honest(rig)
            kicks = [queue.kick_fd for queue in rig.queues]
            os.ftruncate(ram.fd, 0)
            for kick in kicks:
                os.eventfd_write(kick, 1)
            assert rig.frontend.is_dropped()
        assert "session ended: guest memory is gone: the file that the frontend shared was" in target.words
        with Rig(target, device.queues) as rig:
            device.honest(rig)


def test_U6_a_truncated_file_does_not_end_the_other_device_of_its_process(tmp_path: Path) -> None:
    """Two network cards, each other's network."""
    net = DEVICES["net"]
    other = tmp_path / "other"
    with alone(net, tmp_path, "--join", other) as target, GuestRam(seal=False) as ram:
        hers = Rig(target, 2, ram=ram)
        target.path = other
        with Rig(target, 2) as ours:
            net.honest(ours)
            os.ftruncate(ram.fd, 0)
            net.honest(ours)
            os.eventfd_write(hers.queues[1].kick_fd, 1)
            assert hers.frontend.is_dropped()
            net.honest(ours)
        hers.close()


def test_U10_a_second_frontend_is_closed_and_the_operator_reads_of_it(tmp_path: Path) -> None:
    """Not kept waiting; the first does not notice. Whoever comes after it left is served, without a pause."""
    blk = DEVICES["blk"]
    with alone(blk, tmp_path) as target:
        with Rig(target, 1) as rig:
            for _ in range(3):
                with target.connect() as second, pytest.raises(Dropped):
                    second.ask_u64(FrontendRequest.GET_FEATURES)
            blk.honest(rig)
        assert target.words.count("blk: a second frontend was closed: one is connected") == 3
        for _ in range(50):
            with target.connect() as frontend:
                frontend.ask_u64(FrontendRequest.GET_FEATURES)


def test_U10_why_a_session_ended_is_told(tmp_path: Path) -> None:
    """The device and the reason, for every fault of the protocol; and what was refused without an end."""
    blk = DEVICES["blk"]
    faults = {
        "unknown request 99": (99, b""),
        "queue 200: blk has 1": (FrontendRequest.SET_VRING_ENABLE, VRING_STATE.pack(200, 1)),
        "queue 0 of 3 entries: a power of 2 up to 1024 is allowed": (
            FrontendRequest.SET_VRING_NUM,
            VRING_STATE.pack(0, 3),
        ),
        "SET_VRING_KICK without its descriptor": (FrontendRequest.SET_VRING_KICK, U64.pack(0)),
        "1 memory regions came with 0 descriptors": (FrontendRequest.SET_MEM_TABLE, b""),
    }
    with alone(blk, tmp_path) as target:
        for sentence, (request, payload) in faults.items():
            with GuestRam(PAGE) as ram, target.connect() as frontend:
                frontend.negotiate()
                frontend.send(request, payload or (pack_memory_table([ram]) if request == 5 else b""))
                assert frontend.is_dropped()
            assert f"blk: session ended: {sentence}\n" in target.words
        with target.connect() as frontend:
            frontend.negotiate()
            assert frontend.is_refused(FrontendRequest.SET_VRING_NUM, VRING_STATE.pack(0, 5))
            assert "blk: request refused: queue 0 of 5 entries" in target.words
            frontend.ask_u64(FrontendRequest.GET_FEATURES)


def test_U10_what_the_terminal_is_told_has_a_bound(tmp_path: Path) -> None:
    """Frontends that come and go as fast as they can: some lines, and how many were left out."""
    with alone(DEVICES["blk"], tmp_path) as target:
        for _ in range(500):
            with target.connect() as frontend:
                frontend.ask_u64(FrontendRequest.GET_FEATURES)
        assert target.words.count("\n") < 200
        with target.connect() as frontend:
            frontend.negotiate()

            deadline = time.monotonic() + ANSWER_TIMEOUT
            while "lines before this one were left out" not in target.words:
                assert time.monotonic() < deadline
                frontend.is_refused(FrontendRequest.SET_VRING_NUM, VRING_STATE.pack(0, 5))

"""The keeper's memory of a conversation brings a fresh backend to the same place."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Sequence

import pytest

from rayos_devices.loop import Loop
from rayos_devices.vhost_user.message import (
    ANSWERED,
    CONFIG_HEADER,
    LOG_BASE,
    MEMORY_HEADER,
    U64,
    VRING_STATE,
    FrontendRequest,
    Message,
    pack_region,
)
from rayos_devices.vhost_user.session import Session
from rayos_devices.vhost_user.transcript import Transcript
from rayos_devices.virtio.features import TRANSPORT_FEATURES, Feature
from rayos_devices.virtio.memory import F_SEAL_SHRINK
from tests.framework.driver import DriverQueue
from tests.framework.echo import EchoBackend
from tests.framework.frontend import pack_address
from tests.framework.guest_memory import F_ADD_SEALS, GuestRam
from tests.framework.target import Footprint


class Both:
    """Says everything to a backend and to a transcript, and builds a successor from the latter."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.transcript = Transcript(2)
        self.backend, self.session = self._fresh()
        self.ram = GuestRam(1 << 16)
        self.queues = [DriverQueue(self.ram, 16) for _ in range(2)]

    def _fresh(self) -> tuple[EchoBackend, Session]:
        backend = EchoBackend(self.loop)
        return backend, Session(backend, self.loop)

    def say(self, request: FrontendRequest, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes | None:
        def message() -> Message:
            return Message(request, 1, payload, [os.dup(fd) for fd in fds])

        answer = self.session.handle(message())
        self.transcript.fold(message(), None if answer is None else answer[12:])
        return answer

    def start(self, index: int) -> None:
        queue = self.queues[index]
        self.say(FrontendRequest.SET_VRING_NUM, VRING_STATE.pack(index, queue.size))
        self.say(FrontendRequest.SET_VRING_BASE, VRING_STATE.pack(index, 0))
        self.say(FrontendRequest.SET_VRING_ADDR, pack_address(index, queue))
        self.say(FrontendRequest.SET_VRING_KICK, U64.pack(index), [queue.kick_fd])
        self.say(FrontendRequest.SET_VRING_ENABLE, VRING_STATE.pack(index, 1))

    def open(self) -> None:
        self.say(FrontendRequest.SET_FEATURES, U64.pack(TRANSPORT_FEATURES))
        self.say(
            FrontendRequest.SET_MEM_TABLE,
            MEMORY_HEADER.pack(1, 0) + pack_region(self.ram.spec),
            [self.ram.fd],
        )
        for index, queue in enumerate(self.queues):
            self.say(FrontendRequest.SET_VRING_CALL, U64.pack(index), [queue.call_fd])
            self.say(FrontendRequest.SET_VRING_ERR, U64.pack(index), [queue.error_fd])
            self.start(index)

    def succeed(self) -> EchoBackend:
        """Replace the backend by one that was told the transcript."""
        self.session.close()
        self.backend, self.session = self._fresh()
        for message in self.transcript.replay():
            fds = [os.dup(fd) for fd in message.fds]
            answer = self.session.handle(Message(message.request, message.flags, message.payload, fds))
            assert (answer is None) == (message.request not in ANSWERED)
        return self.backend

    def close(self) -> None:
        self.session.close()
        self.transcript.close()
        for queue in self.queues:
            queue.close()
        self.ram.close()
        self.loop.close()


@pytest.fixture
def both() -> Iterator[Both]:
    before = Footprint()
    both = Both()
    yield both
    both.close()
    before.check()


def seen(backend: EchoBackend) -> list[tuple[bool, int, bool, bool]]:
    return [(q.attached, q.size, q.call_fd >= 0, q.error_fd >= 0) for q in backend.queues]


def test_a_running_device(both: Both) -> None:
    """Queues, memory, features, configuration, status, and the channel for changes of the configuration."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            both.say(FrontendRequest.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        both.open()
        both.say(FrontendRequest.SET_STATUS, U64.pack(0xF))
        both.say(FrontendRequest.SET_CONFIG, CONFIG_HEADER.pack(0, 4, 0) + b"ECHO")
        before = seen(both.backend)
        successor = both.succeed()
        assert seen(successor) == before == [(True, 16, True, True)] * 2
        assert successor.acked_features == TRANSPORT_FEATURES
        assert (successor.status, successor.config_space()[:4]) == (0xF, b"ECHO")
        successor.tell_config_change()
        assert len(ours.recv(100)) == 12


def test_a_device_that_was_reset(both: Both) -> None:
    """RESET_DEVICE: no queue runs and nothing is acknowledged; signals and memory are there for the next driver."""
    both.open()
    both.say(FrontendRequest.RESET_DEVICE)
    successor = both.succeed()
    assert seen(successor) == [(False, 0, True, True)] * 2
    assert successor.acked_features == 0
    both.say(FrontendRequest.SET_FEATURES, U64.pack(TRANSPORT_FEATURES))
    both.start(1)
    assert seen(both.succeed()) == [(False, 0, True, True), (True, 16, True, True)]


def test_a_queue_that_was_stopped(both: Both) -> None:
    """GET_VRING_BASE: the queue stays stopped, keeps its call, and goes on where it was."""
    both.open()
    answer = both.say(FrontendRequest.GET_VRING_BASE, VRING_STATE.pack(0, 0))
    assert answer is not None
    assert seen(both.succeed()) == [(False, 0, True, True), (True, 16, True, True)]
    queue = both.queues[0]
    both.say(FrontendRequest.SET_VRING_KICK, U64.pack(0), [queue.kick_fd])
    assert seen(both.succeed())[0] == (True, 16, True, True)


def test_a_device_whose_writes_are_logged(both: Both) -> None:
    """SET_LOG_BASE: what the successor writes is in the log, too."""
    log = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(log, 4096)
        fcntl.fcntl(log, F_ADD_SEALS, F_SEAL_SHRINK)
        both.open()
        both.say(FrontendRequest.SET_LOG_BASE, LOG_BASE.pack(4096, 0), [log])
        both.say(FrontendRequest.SET_FEATURES, U64.pack(TRANSPORT_FEATURES | Feature.LOG_ALL))
        both.succeed()
        os.pwrite(log, bytes(4096), 0)
        queue, target = both.queues[0], both.ram.allocate(4, 4096)
        queue.submit([(both.ram.put(b"ping"), 4)], [(target, 4)])
        for _ in range(4):
            both.loop.step(0)
        assert len(queue.collect()) == 1
        page = target >> 12
        assert os.pread(log, 4096, 0)[page >> 3] & 1 << (page & 7)
    finally:
        os.close(log)

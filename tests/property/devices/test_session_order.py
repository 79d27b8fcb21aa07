"""vhost-user messages in any order (row U7): only class P may come of it, and nothing is left open."""

from __future__ import annotations

import gc
import os
import socket
import struct

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rayos_devices.errors import ProtocolError
from rayos_devices.loop import Loop
from rayos_devices.vhost_user.message import (
    MEMORY_HEADER,
    U64,
    VRING_NO_FD,
    VRING_STATE,
    FrontendRequest,
    Message,
    pack_region,
)
from rayos_devices.vhost_user.session import Session
from rayos_devices.virtio.memory import RegionSpec
from tests.framework.driver import DriverQueue
from tests.framework.echo import EchoBackend
from tests.framework.frontend import pack_address
from tests.framework.guest_memory import GuestRam
from tests.framework.target import Footprint, open_fds

INDEX = st.sampled_from([0, 0, 0, 1, 1, 2, 0xFF, 0x10001, 0xFFFFFFFF])
QUEUE = st.integers(0, 1)


class Frontend(RuleBasedStateMachine):
    """Sends what it likes to one session after the other of the same backend."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()  # what a test before us left in cycles may hold guest memory
        self.before = Footprint()
        self.ram = GuestRam(1 << 16)
        self.more = GuestRam(1 << 12, guest_address=0x4000_0000)
        self.queues = [DriverQueue(self.ram, size) for size in (8, 32)]
        self.loop = Loop()
        self.backend = EchoBackend(self.loop)
        self.session = Session(self.backend, self.loop)
        self.refused = 0
        self.channel, self.other_end = socket.socketpair()

    def teardown(self) -> None:
        self.session.close()
        self.backend.close()
        self.loop.close()
        for queue in self.queues:
            queue.close()
        self.ram.close()
        self.more.close()
        self.channel.close()
        self.other_end.close()
        self.before.check()

    def send(
        self, request: FrontendRequest, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 1
    ) -> None:
        message = Message(request, flags, payload, [os.dup(fd) for fd in fds])
        try:
            self.session.handle(message)
        except ProtocolError as error:
            assert str(error)
            self.refused += 1
            self.session.close()
            assert not any(queue.attached for queue in self.backend.queues)
            self.session = Session(self.backend, self.loop)
        assert message.fds == [], "a descriptor stayed in its message"

    @rule(features=st.sampled_from([0, 1 << 30, 1 << 29, (1 << 32) | (1 << 30), (1 << 64) - 1]))
    def features(self, features: int) -> None:
        self.send(FrontendRequest.SET_FEATURES, U64.pack(features))

    @rule(flags=st.sampled_from([1, 9]))
    def questions(self, flags: int) -> None:
        for request in (
            FrontendRequest.GET_FEATURES,
            FrontendRequest.GET_PROTOCOL_FEATURES,
            FrontendRequest.GET_QUEUE_NUM,
            FrontendRequest.SET_OWNER,
        ):
            self.send(request, flags=flags)

    @rule()
    def reset_owner(self) -> None:
        self.send(FrontendRequest.RESET_OWNER)

    @rule(status=st.sampled_from([0, 1, 0xF, 0xFF, 0x100, (1 << 64) - 1]))
    def status(self, status: int) -> None:
        self.send(FrontendRequest.SET_STATUS, U64.pack(status))
        self.send(FrontendRequest.GET_STATUS)

    @rule()
    def reset_device(self) -> None:
        self.send(FrontendRequest.RESET_DEVICE)
        assert not any(queue.attached for queue in self.backend.queues)

    @rule(is_socket=st.booleans())
    def backend_channel(self, is_socket: bool) -> None:
        self.send(
            FrontendRequest.SET_BACKEND_REQ_FD, b"", (self.channel.fileno() if is_socket else self.ram.fd,)
        )
        self.backend.tell_config_change()

    @rule()
    def memory(self) -> None:
        self.send(
            FrontendRequest.SET_MEM_TABLE,
            MEMORY_HEADER.pack(1, 0) + pack_region(self.ram.spec),
            (self.ram.fd,),
        )

    @rule(
        size=st.sampled_from([0, 1, 4096, 1 << 16, 1 << 17, 1 << 40, (1 << 64) - 1]),
        address=st.sampled_from([0, 0x10_0000, 0x4000_0000, (1 << 64) - 4096]),
        count=st.integers(0, 3),
    )
    def odd_memory(self, size: int, address: int, count: int) -> None:
        spec = RegionSpec(address, size, address, 0)
        payload = MEMORY_HEADER.pack(count, 0) + pack_region(spec) * count
        self.send(FrontendRequest.SET_MEM_TABLE, payload, (self.ram.fd,) * count)

    @rule()
    def add_memory(self) -> None:
        self.send(FrontendRequest.ADD_MEM_REG, bytes(8) + pack_region(self.more.spec), (self.more.fd,))

    @rule(main=st.booleans(), with_fd=st.booleans())
    def remove_memory(self, main: bool, with_fd: bool) -> None:
        ram = self.ram if main else self.more
        self.send(FrontendRequest.REM_MEM_REG, bytes(8) + pack_region(ram.spec), (ram.fd,) * with_fd)

    @rule(index=INDEX, size=st.sampled_from([8, 8, 32, 0, 7, 1024, 2048]))
    def size(self, index: int, size: int) -> None:
        self.send(FrontendRequest.SET_VRING_NUM, VRING_STATE.pack(index, size))

    @rule(index=INDEX, base=st.sampled_from([0, 1, 65535, 65536]))
    def base(self, index: int, base: int) -> None:
        self.send(FrontendRequest.SET_VRING_BASE, VRING_STATE.pack(index, base))

    @rule(index=INDEX, queue=QUEUE, shift=st.sampled_from([0, 0, 0, 1, 4096, 1 << 40, (1 << 63)]))
    def address(self, index: int, queue: int, shift: int) -> None:
        payload = bytearray(pack_address(0, self.queues[queue]))
        struct.pack_into("<I", payload, 0, index)
        struct.pack_into("<Q", payload, 8, struct.unpack_from("<Q", payload, 8)[0] + shift)
        self.send(FrontendRequest.SET_VRING_ADDR, bytes(payload))

    @rule(index=INDEX, enabled=st.sampled_from([0, 1, 1, 2]))
    def enable(self, index: int, enabled: int) -> None:
        self.send(FrontendRequest.SET_VRING_ENABLE, VRING_STATE.pack(index, enabled))

    @rule(
        request=st.sampled_from(
            [FrontendRequest.SET_VRING_KICK, FrontendRequest.SET_VRING_CALL, FrontendRequest.SET_VRING_ERR]
        ),
        index=st.sampled_from([0, 0, 1, 2, 0x10000, 1 << 63]),
        queue=QUEUE,
        kind=st.sampled_from(["event", "event", "none", "both", "memory", "missing"]),
    )
    def descriptor(self, request: FrontendRequest, index: int, queue: int, kind: str) -> None:
        value = index | (VRING_NO_FD if kind in ("none", "both") else 0)
        fd = self.ram.fd if kind == "memory" else self.queues[queue].kick_fd
        self.send(request, U64.pack(value), (fd,) * (kind in ("event", "both", "memory")))

    @rule(index=INDEX)
    def stop(self, index: int) -> None:
        self.send(FrontendRequest.GET_VRING_BASE, VRING_STATE.pack(index, 0))

    @rule(queue=QUEUE)
    def start_properly(self, queue: int) -> None:
        """So that much of what follows meets a running queue."""
        self.stop(queue)
        driver = self.queues[queue]
        driver.reset()
        self.features(1 << 30)
        self.memory()
        self.size(queue, driver.size)
        self.base(queue, 0)
        self.address(queue, queue, 0)
        self.descriptor(FrontendRequest.SET_VRING_CALL, queue, queue, "event")
        self.descriptor(FrontendRequest.SET_VRING_KICK, queue, queue, "event")
        self.enable(queue, 1)
        assert self.backend.queues[queue].attached

    @precondition(lambda self: any(queue.free for queue in self.queues))
    @rule(queue=QUEUE, jump=st.sampled_from([0, 0, 0, 100]))
    def work(self, queue: int, jump: int) -> None:
        driver = self.queues[queue]
        if driver.free:
            driver.offer([driver.add((), [(self.ram.base, 4)])])
            driver.set_avail_index(driver.avail_index + jump)
        driver.kick(always=True)
        self.loop.step(0)
        self.loop.step(0)
        driver.collect()

    @rule()
    def turn(self) -> None:
        self.loop.step(0)

    @invariant()
    def descriptors_are_bounded(self) -> None:
        # Per queue a kick, a call and an error descriptor; a mapping each of the two memories.
        assert open_fds() - self.before.fds <= 8 + 3 + 6 + 2 + 3 + 3


TestAnyOrder = Frontend.TestCase
TestAnyOrder.settings = settings(
    max_examples=75, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

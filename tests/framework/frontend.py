"""A vhost-user frontend over a connected unix socket: what QEMU says, or anything at all.

The socket is non-blocking; while an answer is awaited `pump` is called, which steps a loop in this thread
or sleeps until the socket is readable. Every descriptor given stays the caller's.
"""

from __future__ import annotations

import array
import select
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

from rayos_devices.vhost_user.message import (
    ANSWERED,
    CONFIG_HEADER,
    FLAG_REPLY,
    HEADER,
    MEMORY_HEADER,
    U64,
    VERSION,
    VRING_NO_FD,
    VRING_STATE,
    FrontendRequest,
    ProtocolFeature,
    VringAddress,
    pack_region,
    pack_request,
)
from rayos_devices.virtio.features import Feature
from tests.framework.driver import DriverQueue
from tests.framework.guest_memory import GuestRam

#: Seconds to wait for an answer of a healthy device on a loaded machine.
ANSWER_TIMEOUT: Final = 10.0


class Dropped(Exception):
    """The backend closed the connection: its reaction to a protocol error (class P)."""


class Frontend:
    """One connection. `features` and `protocol_features` hold what `negotiate` settled."""

    def __init__(self, sock: socket.socket, pump: Callable[[], None] | None = None) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._pump = pump or (lambda: self._poll.poll(100) and None)
        self._data = b""
        self.features = 0
        self.protocol_features = ProtocolFeature(0)

    @classmethod
    def connect(cls, path: Path, *, timeout: float = ANSWER_TIMEOUT) -> Self:
        """Connect to a backend that serves `path`, waiting for it to listen."""
        deadline = time.monotonic() + timeout
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(path))
                return cls(sock)
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- bytes and messages --------------------------------------------------------------------------------------

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Any bytes with any descriptors. Errors: Dropped when the backend is gone."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            try:
                sent = self.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._pump()
                continue
            except ConnectionError as error:
                raise Dropped from error
            data, ancillary = data[sent:], []
            if not data:
                return

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, need_reply: bool = False
    ) -> None:
        """One message; unknown request numbers too."""
        if request in FrontendRequest.__members__.values():
            self.send_raw(pack_request(FrontendRequest(request), payload, need_reply=need_reply), fds)
        else:
            self.send_raw(HEADER.pack(request, VERSION, len(payload)) + payload, fds)

    def receive(self, *, timeout: float = ANSWER_TIMEOUT) -> tuple[int, int, bytes]:
        """The next reply: request, flags, payload. Errors: Dropped at the end of the stream; TimeoutError."""
        deadline = time.monotonic() + timeout
        wanted = HEADER.size
        while True:
            while len(self._data) < wanted:
                self._fill(wanted - len(self._data), deadline)
            if wanted == HEADER.size and (size := HEADER.unpack(self._data)[2]):
                wanted += size
                continue
            data, self._data = self._data, b""
            request, flags, _ = HEADER.unpack_from(data)
            return request, flags, data[HEADER.size :]

    def _fill(self, wanted: int, deadline: float) -> None:
        while True:
            try:
                data = self.sock.recv(wanted)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError("the backend does not answer") from None
                self._pump()
                continue
            except ConnectionError as error:
                raise Dropped from error
            if not data:
                raise Dropped
            self._data += data
            return

    def ask(self, request: FrontendRequest, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send and return the payload of the answer. Errors: Dropped; AssertionError for another's answer."""
        self.send(request, payload, fds, need_reply=request not in ANSWERED)
        number, flags, answer = self.receive()
        assert (number, flags) == (request, VERSION | FLAG_REPLY), (number, flags)
        return answer

    def tell(self, request: FrontendRequest, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send and wait until it was acted upon (REPLY_ACK). Errors: Dropped; AssertionError for a refusal."""
        answer = U64.unpack(self.ask(request, payload, fds))[0]
        assert answer == 0, f"{request.name} was answered with {answer}"

    def is_refused(self, request: FrontendRequest, payload: bytes = b"", fds: Sequence[int] = ()) -> bool:
        """Whether a request is answered with a failure (REPLY_ACK), by a backend that stays. Errors: Dropped."""
        return bool(U64.unpack(self.ask(request, payload, fds))[0])

    def is_dropped(self, *, timeout: float = ANSWER_TIMEOUT) -> bool:
        """Whether the backend closes the connection within `timeout` seconds; replies that come first are skipped."""
        try:
            while True:
                self.receive(timeout=timeout)
        except Dropped:
            return True
        except TimeoutError:
            return False

    # -- the protocol, politely ----------------------------------------------------------------------------------

    def ask_u64(self, request: FrontendRequest) -> int:
        return int(U64.unpack(self.ask(request))[0])

    def negotiate(
        self,
        features: int | None = None,
        protocol_features: int | None = None,
        *,
        packed: bool = False,
    ) -> int:
        """Features and protocol features as QEMU does. Returns the features offered.

        None takes all of them but what legacy drivers have, of the rings the `packed` or the split.
        """
        offered = self.ask_u64(FrontendRequest.GET_FEATURES)
        if offered & Feature.PROTOCOL_FEATURES:
            known = self.ask_u64(FrontendRequest.GET_PROTOCOL_FEATURES)
            self.protocol_features = ProtocolFeature(
                known if protocol_features is None else known & protocol_features
            )
            self.send(FrontendRequest.SET_PROTOCOL_FEATURES, U64.pack(self.protocol_features))
        self.send(FrontendRequest.SET_OWNER)
        # What a driver of VIRTIO 1.0 and later has no use of.
        rest = Feature.NOTIFY_ON_EMPTY | Feature.ANY_LAYOUT | (0 if packed else Feature.RING_PACKED)
        self.features = offered & ~rest if features is None else features
        self.tell(FrontendRequest.SET_FEATURES, U64.pack(self.features))
        return offered

    def set_memory(self, *regions: GuestRam) -> None:
        """SET_MEM_TABLE."""
        self.tell(FrontendRequest.SET_MEM_TABLE, pack_memory_table(regions), [ram.fd for ram in regions])

    def set_ring(self, index: int, queue: DriverQueue, *, base: int | None = None) -> None:
        """NUM, BASE, ADDR: where the ring is; it does not run yet."""
        self.tell(FrontendRequest.SET_VRING_NUM, VRING_STATE.pack(index, queue.size))
        self.tell(
            FrontendRequest.SET_VRING_BASE, VRING_STATE.pack(index, queue.start if base is None else base)
        )
        self.tell(FrontendRequest.SET_VRING_ADDR, pack_address(index, queue))

    def start(self, index: int, queue: DriverQueue, *, base: int | None = None, enable: bool = True) -> None:
        """The whole set-up of one queue; it runs when this returns."""
        self.set_ring(index, queue, base=base)
        self.tell(FrontendRequest.SET_VRING_ERR, U64.pack(index), [queue.error_fd])
        self.tell(FrontendRequest.SET_VRING_CALL, U64.pack(index), [queue.call_fd])
        self.tell(FrontendRequest.SET_VRING_KICK, U64.pack(index), [queue.kick_fd])
        if enable:
            self.enable(index)

    def enable(self, index: int, enabled: int = 1) -> None:
        self.tell(FrontendRequest.SET_VRING_ENABLE, VRING_STATE.pack(index, enabled))

    def stop(self, index: int) -> int:
        """GET_VRING_BASE: the queue is stopped; returns the avail index a successor starts from."""
        answered, base = VRING_STATE.unpack(
            self.ask(FrontendRequest.GET_VRING_BASE, VRING_STATE.pack(index, 0))
        )
        assert answered == index
        return int(base)

    def get_config(self, offset: int, size: int) -> bytes:
        payload = CONFIG_HEADER.pack(offset, size, 0) + bytes(size)
        return self.ask(FrontendRequest.GET_CONFIG, payload)[CONFIG_HEADER.size :]

    def set_config(self, offset: int, data: bytes) -> None:
        self.tell(FrontendRequest.SET_CONFIG, CONFIG_HEADER.pack(offset, len(data), 0) + data)


def pack_memory_table(regions: Sequence[GuestRam]) -> bytes:
    return MEMORY_HEADER.pack(len(regions), 0) + b"".join(pack_region(ram.spec) for ram in regions)


def pack_address(index: int, queue: DriverQueue) -> bytes:
    ram = queue.ram
    return VringAddress(
        index, 0, ram.user(queue.descriptors), ram.user(queue.used), ram.user(queue.avail)
    ).pack()


__all__ = ["VRING_NO_FD", "Dropped", "Frontend", "pack_address", "pack_memory_table"]
